"""Tile sizes of the Triton kernels: a table, so that nothing is tuned while requests wait.

What the sizes rest on, for an H200 (132 multiprocessors with 227 KiB of memory, 4.8 TB/s):

- The compiler pipelines a loop with page numbers in it as loads of loads: with `num_stages` = 5, K
  and V of a tile are on their way two tiles ahead (with 3 or 4 only one, with 7 three).
- A decode program holds two tiles of K and V, 64 KiB, and three programs fit a multiprocessor.
  Covering 1 us of latency takes 36 KiB in flight on each.
- A prefill program has one multiprocessor to itself: 128 rows are two warp groups, whose
  accumulators and scores stay in registers; two tiles ahead hide the gathering of pages.

tests/reference/gpu compiles every row for the architectures we name and holds the results to these
limits: no spilled registers in a loop, and no more memory than a program may have.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class DecodeTiles:
    block_n: int  # keys in a tile
    num_warps: int
    num_stages: int
    programs_per_sm: int  # that fit a multiprocessor together

    @property
    def full_tiles(self) -> int:
        """Tiles of a split that is long enough: 1,024 keys."""
        return 1024 // self.block_n


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    block_m: int  # rows of a tile: positions times the heads of a group
    block_n: int  # keys in a tile
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Table:
    """By padded head_dim and bytes of a value; four bytes are for tests, without tensor cores."""

    prefill: dict[tuple[int, int], PrefillTiles]
    short_prefill: dict[tuple[int, int], PrefillTiles]  # where no chunk fills a larger tile


DECODE: dict[tuple[int, int], DecodeTiles] = {
    (64, 2): DecodeTiles(128, 4, 5, 3),
    (128, 2): DecodeTiles(64, 4, 5, 3),
    (256, 2): DecodeTiles(32, 4, 5, 3),
    (64, 4): DecodeTiles(32, 4, 2, 2),
    (128, 4): DecodeTiles(32, 4, 2, 2),
    (256, 4): DecodeTiles(16, 4, 2, 2),
}
_FLOAT32 = {
    (64, 4): PrefillTiles(32, 32, 4, 2),
    (128, 4): PrefillTiles(32, 32, 4, 2),
    (256, 4): PrefillTiles(16, 16, 4, 2),
}
ROOMY = Table(  # compute capability 9 and 10: 227 KiB for a program, operands read from memory
    prefill=_FLOAT32
    | {
        (64, 2): PrefillTiles(128, 128, 8, 5),
        (128, 2): PrefillTiles(128, 64, 8, 5),
        (256, 2): PrefillTiles(128, 32, 8, 5),
    },
    short_prefill=_FLOAT32
    | {
        (64, 2): PrefillTiles(64, 64, 4, 5),
        (128, 2): PrefillTiles(64, 64, 4, 5),
        (256, 2): PrefillTiles(64, 32, 4, 5),
    },
)
SMALL = Table(  # the others: 99 KiB for a program at the least, operands in registers
    prefill=_FLOAT32
    | {
        (64, 2): PrefillTiles(128, 64, 8, 5),
        (128, 2): PrefillTiles(128, 64, 8, 5),
        (256, 2): PrefillTiles(32, 32, 4, 5),
    },
    short_prefill=_FLOAT32
    | {
        (64, 2): PrefillTiles(64, 64, 4, 5),
        (128, 2): PrefillTiles(64, 32, 4, 5),
        (256, 2): PrefillTiles(32, 32, 4, 5),
    },
)
SEQ_BUCKETS = (32, 256, 1024)  # sequences that a program looks through for its own
MAX_HEAD_DIM = 256
MAX_GROUP = 128  # query heads of one K/V head


def table_of(capability: tuple[int, int]) -> Table:
    """Prefill tiles for a compute capability."""
    return ROOMY if capability[0] in (9, 10) else SMALL


def power_of_two(value: int) -> int:
    """The lowest power of two that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()


def key_of(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Where a head's tiles stand in the tables."""
    return max(power_of_two(head_dim), 64), dtype.itemsize


def seq_bucket(num_seqs: int) -> int:
    """A power of two >= num_seqs, few different ones: each is a kernel of its own."""
    fitting = (bucket for bucket in SEQ_BUCKETS if bucket >= num_seqs)
    return next(fitting, power_of_two(num_seqs))


def decode_tiles(head_dim: int, dtype: torch.dtype) -> DecodeTiles:
    return DECODE[key_of(head_dim, dtype)]


def prefill_tiles(table: Table, head_dim: int, dtype: torch.dtype, num_rows: int) -> PrefillTiles:
    """Tiles where the longest chunk has `num_rows` rows: its tokens times the group's heads."""
    key = key_of(head_dim, dtype)
    short = table.short_prefill[key]
    return short if num_rows <= short.block_m else table.prefill[key]
