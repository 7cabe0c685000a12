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
