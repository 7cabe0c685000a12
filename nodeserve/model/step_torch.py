"""What plain torch knows of a step: the pages as one tensor, and where its tokens are in them."""

from dataclasses import dataclass
from typing import Any

import torch

from nodeserve.errors import ModelError
from nodeserve.model.inputs import StepInputs
from nodeserve.model.kv import KvLayout, pages_over


@dataclass(frozen=True, slots=True)
class TorchCache:
    """Pages over a pool that somebody else owns."""

    pages: torch.Tensor  # [num_blocks, num_layers, planes, num_kv_heads, block_size, head_dim]

    @property
    def num_blocks(self) -> int:
        return self.pages.size(0)


def cache_over(layout: KvLayout, pool: Any, dtype: torch.dtype) -> TorchCache:
    """Pages of `dtype` over `pool`, a buffer or a uint8 tensor."""
    if layout.dtype != dtype:
        raise ModelError(f"the pages are {layout.dtype}, the model is {dtype}")
    raw = pool if isinstance(pool, torch.Tensor) else torch.frombuffer(pool, dtype=torch.uint8)
    return TorchCache(pages_over(layout, raw))


@dataclass(frozen=True, slots=True)
class TorchStep:
    """One step's geometry on the device."""

    pages: torch.Tensor
    positions: torch.Tensor  # [num_tokens] int64
    blocks: torch.Tensor  # [num_tokens] int64: block of each token
    slots: torch.Tensor  # [num_tokens] int64: place inside it
    spans: list[tuple[int, int, int]]  # per sequence: first row, end row, context length
    block_table: torch.Tensor  # [num_seqs, max_blocks] int64


def begin_step(inputs: StepInputs, cache: TorchCache, device: torch.device) -> TorchStep:
    """The step's geometry; reads the inputs on the host."""
    starts, contexts = inputs.query_starts.tolist(), inputs.context_lens.tolist()
    spans = list(zip(starts, starts[1:], contexts, strict=False))
    positions = inputs.positions.to(device, torch.int64)
    table = inputs.block_table.to(device, torch.int64)
    counts = inputs.query_starts.diff().to(device, torch.int64)
    seqs = torch.repeat_interleave(torch.arange(len(spans), device=device), counts)
    block_size = cache.pages.size(4)
    blocks = table[seqs, positions // block_size]
    return TorchStep(cache.pages, positions, blocks, positions % block_size, spans, table)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def attend_pages(
    step: TorchStep,
    layer: int,
    query: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None = None,
) -> torch.Tensor:
    """query and result [num_tokens, num_heads, head_dim] float32: attention of each token to those
    of its sequence up to itself, the last `window` of them, over one layer's keys and values.

    Scores beyond `softcap` are bent towards it.
    """
    out = torch.empty_like(query)
    for seq, (first, end, context) in enumerate(step.spans):
        rows = query[first:end]
        keys, values = _keys_and_values(step, layer, seq, context, query.size(1))
        scores = torch.einsum("thd,hcd->htc", rows, keys) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        row = torch.arange(context - rows.size(0), context, device=rows.device)[:, None]
        distance = row - torch.arange(context, device=rows.device)
        scores.masked_fill_((distance < 0) | (distance >= (window or context)), -torch.inf)
        out[first:end] = torch.einsum("htc,hcd->thd", scores.softmax(-1), values)
    return out


def _keys_and_values(
    step: TorchStep, layer: int, seq: int, context: int, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[num_heads, context, head_dim] float32 each"""
    blocks = step.block_table[seq, : -(-context // step.pages.size(4))]
    pages = step.pages[blocks, layer].permute(1, 2, 0, 3, 4)  # [2, kv, blocks, size, dim]
    keys, values = pages.flatten(2, 3)[:, :, :context].float()
    group = num_heads // keys.size(0)
    return keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
