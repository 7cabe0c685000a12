"""How close attention over latents is to what the GPU can do: rows like `bench.gpu.attention`'s.

DeepSeek's latents, 1,152 bytes a token and layer, read by 16 heads (V2-Lite, or an eighth of V3)
and by V3's 128. The floor of a step is what takes longer of reading each visible latent once and
computing every visible pair; with 16 heads that is the reading, with 128 the two are close.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from bench.gpu.attention import MAX_LAYERS, POOL_BYTES, Ceilings, Row, Work, layer_us
from nodeserve.model.gpu.attention.case import step_of
from nodeserve.model.gpu.attention.latent_choice import make_latent_attention
from nodeserve.model.gpu.attention.latent_parts import LatentHeads
from nodeserve.model.gpu.attention.paged import PagedAttention

NUM_HEADS = (16, 128)
DECODES = ((1, 32768), (8, 8192), (64, 8192), (256, 1024))  # sequences, context
PREFILLS = ((1, 2048, 2048), (1, 2048, 8192))  # sequences, queries, context


def heads_of(num_heads: int) -> LatentHeads:
    return LatentHeads(num_heads, 512, 64, 192**-0.5, 16, torch.bfloat16)


class Steps(NamedTuple):
    """What is measured, of which attention: as `bench.gpu.attention.Steps`, over latents."""

    heads: LatentHeads
    decodes: tuple[tuple[int, int], ...]
    prefills: tuple[tuple[int, int, int], ...]


STEPS = tuple(Steps(heads_of(num_heads), DECODES, PREFILLS) for num_heads in NUM_HEADS)
TOY = (Steps(LatentHeads(2, 32, 16, 0.2, 16, torch.float32), ((2, 20),), ((1, 20, 40),)),)


def visible_bytes(heads: LatentHeads, num_seqs: int, context_len: int) -> int:
    """Bytes of the latents in the contexts of one layer."""
    return num_seqs * context_len * (heads.rank + heads.turned) * heads.dtype.itemsize


def visible_flops(heads: LatentHeads, num_seqs: int, query_len: int, context_len: int) -> int:
    """Multiplications and additions of one layer: scores of a latent and its key, sums of it."""
    before = context_len - query_len
    pairs = num_seqs * (query_len * before + query_len * (query_len + 1) // 2)
    return 2 * heads.num_heads * (2 * heads.rank + heads.turned) * pairs


def floor_us(
    heads: LatentHeads, num_seqs: int, query_len: int, context_len: int, ceilings: Ceilings
) -> float:
    """What one layer takes at the least."""
    reading = visible_bytes(heads, num_seqs, context_len) / ceilings.copy_gb_s / 1e3
    flops = visible_flops(heads, num_seqs, query_len, context_len)
    return max(reading, flops / ceilings.product_tflop_s / 1e6)


def make_work(
    heads: LatentHeads, num_seqs: int, query_len: int, context_len: int, device: torch.device
) -> Work:
    """Sequences of one length, their blocks in random order."""
    layer_bytes = visible_bytes(heads, num_seqs, context_len)
    num_layers = min(max(POOL_BYTES // layer_bytes, 1), MAX_LAYERS)
    blocks, width = -(-context_len // heads.block_size), heads.rank + heads.turned
    shape = (num_seqs * blocks, num_layers, 1, 1, heads.block_size, width)
    pool = torch.empty(shape, dtype=heads.dtype, device=device).normal_()
    table = torch.randperm(num_seqs * blocks, device=device).int().view(num_seqs, blocks)
    rows = (num_seqs * query_len, heads.num_heads)
    query = torch.empty(*rows, width, dtype=heads.dtype, device=device).normal_()
    step = step_of(heads.block_size, [(query_len, context_len)] * num_seqs, table)
    out = torch.empty(*rows, heads.rank, dtype=heads.dtype, device=device)
    return Work(query, pool, step, out)


def bench(
    device: torch.device, ceilings: Ceilings, steps: Sequence[Steps] = STEPS, *, repeats: int = 20
) -> Iterator[Row]:
    """Measure every step; a row's share is that of its floor."""
    for heads, decodes, prefills in steps:
        backend = make_latent_attention(heads, device)
        for num_seqs, context in decodes:
            yield _row(heads, backend, (num_seqs, 1, context), ceilings, repeats, device)
        for sizes in prefills:
            yield _row(heads, backend, sizes, ceilings, repeats, device)


def _row(
    heads: LatentHeads,
    backend: PagedAttention,
    sizes: tuple[int, int, int],
    ceilings: Ceilings,
    repeats: int,
    device: torch.device,
) -> Row:
    num_seqs, query_len, context_len = sizes
    us = layer_us(make_work(heads, *sizes, device), backend, repeats)
    share = floor_us(heads, *sizes, ceilings) / us
    kind = f"{backend.name}, latents, {heads.num_heads} heads"
    if query_len == 1:
        gb_s = visible_bytes(heads, num_seqs, context_len) / us / 1e3
        return Row("decode", kind, *sizes, us, gb_s, share)
    return Row("prefill", kind, *sizes, us, visible_flops(heads, *sizes) / us / 1e6, share)
