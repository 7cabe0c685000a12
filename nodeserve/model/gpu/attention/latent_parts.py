"""The kernels over latents as parts of a backend: tiles, scratch, grids and arguments."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from nodeserve.config import ModelConfig
from nodeserve.model.gpu.attention.kernel_latent import latent_decode, latent_prefill
from nodeserve.model.gpu.attention.parts import Segment
from nodeserve.model.gpu.attention.splits import MERGED_VALUES, WAVES, Splits
from nodeserve.model.gpu.attention.tiles import power_of_two, seq_bucket
from nodeserve.model.gpu.attention.triton_parts import LOG2_E
from nodeserve.model.mla_torch import latent_attention, mla_of

MAX_RANK = 512  # whose sums for a block of heads stay in registers
MAX_TURNED = 128
MERGE_ROWS = 16  # of a block of heads: more would not fit the registers beside each other
FULL_SPLIT = 1024  # keys of a split that is long enough


@dataclass(frozen=True, slots=True)
class LatentHeads:
    """What all layers of a model have in common, as far as attention over latents is concerned."""

    num_heads: int
    rank: int  # numbers of a latent
    turned: int  # numbers of the rotated key behind it
    scale: float  # of the scores
    block_size: int  # tokens
    dtype: torch.dtype


def latent_heads_of(config: ModelConfig, block_size: int, dtype: torch.dtype) -> LatentHeads:
    """The attention of a model, or of its shard, in pages of `block_size` tokens."""
    mla = mla_of(config)
    ranks = mla.kv_lora_rank, mla.qk_rope_head_dim
    return LatentHeads(config.num_heads, *ranks, mla.softmax_scale, block_size, dtype)


@dataclass(frozen=True, slots=True)
class LatentTiles:
    """Sizes of a kernel. A latent of 512 and its key are 1,152 bytes, a tile of 32 is 36 KiB."""

    block_m: int  # rows of a tile
    block_n: int  # keys in a tile
    num_warps: int
    num_stages: int
    programs_per_sm: int  # that fit a multiprocessor together


# With 5 stages two tiles are on their way (see tiles.py). 16 rows fit the 99 KiB that every device
# from capability 8.0 on gives to a program, and a multiprocessor of 9 and 10 has room for two of
# them. 64 keep their sums in the registers of two warp groups.
FEW_ROWS = LatentTiles(16, 32, 4, 5, 2)
SMALL = (replace(FEW_ROWS, programs_per_sm=1),)
ROOMY = (FEW_ROWS, LatentTiles(32, 32, 8, 5, 1), LatentTiles(64, 32, 8, 5, 1))
FLOAT32 = (LatentTiles(16, 16, 4, 1, 1),)  # for tests: no tensor cores


def tiles_of(dtype: torch.dtype, capability: tuple[int, int]) -> tuple[LatentTiles, ...]:
    """What there is for a device, by rising rows."""
    if dtype == torch.float32:
        return FLOAT32
    return ROOMY if capability[0] in (9, 10) else SMALL


def fitting(tiles: tuple[LatentTiles, ...], num_rows: int) -> LatentTiles:
    """The smallest that holds `num_rows`, or the largest."""
    return next((one for one in tiles if one.block_m >= num_rows), tiles[-1])


def heads_in_block(num_heads: int, tiles: tuple[LatentTiles, ...]) -> int:
    """Heads that a program takes together: as many as fit its rows and divide them all."""
    most = min(num_heads, tiles[-1].block_m)
    return next(size for size in range(most, 0, -1) if num_heads % size == 0)


def common_constants(
    heads: LatentHeads, tiles: LatentTiles, group: int, num_seqs: int
) -> dict[str, Any]:
    """Compile-time arguments of both kernels, with their launch options."""
    return {
        "GROUP": group,
        "RANK": heads.rank,
        "TURNED": heads.turned,
        "BLOCK_SIZE": heads.block_size,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_R": max(power_of_two(heads.rank), 16),
        "BLOCK_T": max(power_of_two(heads.turned), 16),
        "NUM_SEQS_POW2": seq_bucket(num_seqs),
        "PRECISION": "ieee" if heads.dtype == torch.float32 else "tf32",
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def decode_constants(
    heads: LatentHeads, tiles: LatentTiles, group: int, num_seqs: int
) -> dict[str, Any]:
    """Compile-time arguments of `latent_decode`, with its launch options."""
    rows = min(power_of_two(group), MERGE_ROWS)
    return common_constants(heads, tiles, group, num_seqs) | {
        "MERGE_ROWS": rows,
        "MERGE": max(MERGED_VALUES // (rows * power_of_two(heads.rank)), 1),
        "WAVES": WAVES,
        "FULL_TILES": FULL_SPLIT // tiles.block_n,
    }


def _block_stride(pages: torch.Tensor) -> int:
    """From block to block, in values."""
    stride = pages.stride()
    assert (stride[3], stride[4]) == (pages.size(4), 1), "tokens in a block have to be contiguous"
    return stride[0]


class LatentDecode:
    """Split decode attention. Its grid depends on host ints only, so it can be captured."""

    name = "triton"
    capturable = True

    def __init__(
        self, heads: LatentHeads, device: torch.device, num_sms: int, capability: tuple[int, int]
    ) -> None:
        self._heads = heads
        tiles = tiles_of(heads.dtype, capability)
        self._group = heads_in_block(heads.num_heads, tiles)
        self._blocks = heads.num_heads // self._group
        self._tiles = fitting(tiles, self._group)
        wave = num_sms * self._tiles.programs_per_sm // self._blocks
        shape = self._blocks, self._group, heads.rank
        self._splits = Splits(wave, self._tiles.block_n, *shape, device)

    def reserve(self, max_tokens: int, max_seqs: int, max_context_len: int) -> None:
        self._splits.room(max_seqs)

    def run(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        segment: Segment,
        out: torch.Tensor,
        window: int | None,
    ) -> None:
        """pages [num_blocks, 1, 1, block_size, rank + turned]; out [num_seqs, num_heads, rank]"""
        assert window is None, "latents know no window"
        num_seqs = segment.num_seqs
        room = self._splits.room(num_seqs)
        latent_decode[self._blocks, self._splits.max_items(num_seqs, segment.max_context_len)](
            query,
            pages,
            out,
            room.partials,
            room.stats,
            room.arrivals,
            segment.block_table,
            segment.context_lens,
            num_seqs,
            segment.block_table.stride(0),
            _block_stride(pages),
            query.stride(0),
            out.stride(0),
            self._heads.scale * LOG2_E,
            self._splits.wave,
            **decode_constants(self._heads, self._tiles, self._group, num_seqs),
        )


class LatentPrefill:
    """Causal attention of prompt chunks over their pages."""

    name = "triton"
    capturable = True

    def __init__(self, heads: LatentHeads, capability: tuple[int, int]) -> None:
        self._heads = heads
        self._tiles = tiles_of(heads.dtype, capability)
        self._group = heads_in_block(heads.num_heads, self._tiles)

    def reserve(self, max_tokens: int, max_seqs: int, max_context_len: int) -> None:
        pass  # needs no scratch

    def run(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        segment: Segment,
        out: torch.Tensor,
        window: int | None,
    ) -> None:
        """pages [num_blocks, 1, 1, block_size, rank + turned]; out [tokens, num_heads, rank]"""
        assert window is None, "latents know no window"
        num_seqs = segment.num_seqs
        tiles = fitting(self._tiles, segment.max_query_len * self._group)
        # Each sequence may leave one tile unfilled; which does is known on the device only.
        items = math.ceil(query.size(0) / (tiles.block_m // self._group)) + num_seqs - 1
        latent_prefill[self._heads.num_heads // self._group, items](
            query,
            pages,
            out,
            segment.query_starts,
            segment.context_lens,
            segment.block_table,
            num_seqs,
            segment.block_table.stride(0),
            _block_stride(pages),
            query.stride(0),
            out.stride(0),
            self._heads.scale * LOG2_E,
            **common_constants(self._heads, tiles, self._group, num_seqs),
        )


class LatentReference:
    """Plain torch, sequence by sequence: the judge of both. Reads lengths back from the device."""

    name = "reference"
    capturable = False

    def __init__(self, heads: LatentHeads) -> None:
        self._heads = heads

    def reserve(self, max_tokens: int, max_seqs: int, max_context_len: int) -> None:
        pass  # needs no scratch

    def run(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        segment: Segment,
        out: torch.Tensor,
        window: int | None,
    ) -> None:
        assert window is None, "latents know no window"
        starts, contexts = segment.query_starts.tolist(), segment.context_lens.tolist()
        for seq, context in enumerate(contexts):
            rows = slice(starts[seq], starts[seq + 1])
            if context == 0:
                out[rows].zero_()
                continue
            blocks = segment.block_table[seq, : -(-context // pages.size(3))].long()
            latents = pages[blocks, 0, 0].flatten(0, 1)[:context].float()
            heads = self._heads
            out[rows].copy_(latent_attention(query[rows].float(), latents, heads.rank, heads.scale))
