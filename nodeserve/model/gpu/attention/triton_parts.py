"""The in-tree Triton kernels as parts of a backend: scratch, grids and arguments."""

import math
from typing import Any

import torch

from nodeserve.model.gpu.attention.kernel_decode import paged_decode
from nodeserve.model.gpu.attention.kernel_prefill import paged_prefill
from nodeserve.model.gpu.attention.parts import Heads, Segment
from nodeserve.model.gpu.attention.splits import MERGED_VALUES, WAVES, Splits
from nodeserve.model.gpu.attention.tiles import (
    DecodeTiles,
    PrefillTiles,
    Table,
    decode_tiles,
    power_of_two,
    prefill_tiles,
    seq_bucket,
)

LOG2_E = 1.4426950408889634


def common_constants(heads: Heads, num_seqs: int, window: int | None) -> dict[str, Any]:
    """Compile-time arguments of both kernels."""
    return {
        "WINDOWED": window is not None,
        "GROUP": heads.group,
        "HEAD_DIM": heads.head_dim,
        "BLOCK_SIZE": heads.block_size,
        "BLOCK_D": power_of_two(heads.head_dim),
        "NUM_SEQS_POW2": seq_bucket(num_seqs),
        # Tests compare float32 closely; the tensor cores' tf32 would cost 13 bits of it.
        "PRECISION": "ieee" if heads.dtype == torch.float32 else "tf32",
    }


def decode_constants(
    heads: Heads, tiles: DecodeTiles, num_seqs: int, window: int | None
) -> dict[str, Any]:
    """Compile-time arguments of `paged_decode`, with its launch options."""
    group, block_d = power_of_two(heads.group), power_of_two(heads.head_dim)
    return common_constants(heads, num_seqs, window) | {
        "BLOCK_M": max(group, 16),
        "BLOCK_N": tiles.block_n,
        "GROUP_POW2": group,
        "MERGE": max(MERGED_VALUES // (group * block_d), 1),
        "WAVES": WAVES,
        "FULL_TILES": tiles.full_tiles,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def prefill_constants(
    heads: Heads, tiles: PrefillTiles, num_seqs: int, window: int | None
) -> dict[str, Any]:
    """Compile-time arguments of `paged_prefill`, with its launch options."""
    return common_constants(heads, num_seqs, window) | {
        "BLOCK_M": max(tiles.block_m, power_of_two(heads.group)),
        "BLOCK_N": tiles.block_n,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def page_strides(pages: torch.Tensor) -> tuple[int, int, int]:
    """From block to block, from K to V and from head to head, in values."""
    block, value, head, slot, last = pages.stride()
    assert (slot, last) == (pages.size(4), 1), "a head's tokens in a block have to be contiguous"
    return block, value, head


class TritonDecode:
    """Split decode attention. Its grid depends on host ints only, so it can be captured."""

    name = "triton"
    capturable = True

    def __init__(self, heads: Heads, device: torch.device, num_sms: int) -> None:
        self._heads = heads
        self._tiles = tiles = decode_tiles(heads.head_dim, heads.dtype)
        wave = num_sms * tiles.programs_per_sm // heads.num_kv_heads
        shape = heads.num_kv_heads, heads.group, heads.head_dim
        self._splits = Splits(wave, tiles.block_n, *shape, device)

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
        heads, num_seqs = self._heads, segment.num_seqs
        room = self._splits.room(num_seqs)
        grid = (heads.num_kv_heads, self._splits.max_items(num_seqs, segment.max_context_len))
        paged_decode[grid](
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
            *page_strides(pages),
            query.stride(0),
            out.stride(0),
            heads.head_dim**-0.5 * LOG2_E,
            window or 0,
            self._splits.wave,
            **decode_constants(heads, self._tiles, num_seqs, window),
        )


class TritonPrefill:
    """Causal attention of prompt chunks over their pages."""

    name = "triton"
    capturable = True

    def __init__(self, heads: Heads, table: Table) -> None:
        self._heads = heads
        self._table = table

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
        heads, num_seqs = self._heads, segment.num_seqs
        num_rows = segment.max_query_len * heads.group
        tiles = prefill_tiles(self._table, heads.head_dim, heads.dtype, num_rows)
        constants = prefill_constants(heads, tiles, num_seqs, window)
        positions = constants["BLOCK_M"] // heads.group
        # Each sequence may leave one tile unfilled; which does is known on the device only.
        items = math.ceil(query.size(0) / positions) + num_seqs - 1
        paged_prefill[heads.num_kv_heads, items](
            query,
            pages,
            out,
            segment.query_starts,
            segment.context_lens,
            segment.block_table,
            num_seqs,
            segment.block_table.stride(0),
            *page_strides(pages),
            query.stride(0),
            out.stride(0),
            heads.head_dim**-0.5 * LOG2_E,
            window or 0,
            **constants,
        )
