"""Random steps over random pages: what a backend is tried on before it serves, and in tests."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nodeserve.model.gpu.attention.parts import Heads
from nodeserve.model.gpu.step import GpuStep


@dataclass(frozen=True, slots=True)
class Case:
    """One attention call; `out` is what it is to write."""

    query: torch.Tensor  # [num_tokens, num_heads, head_dim]
    pages: torch.Tensor  # [num_blocks, 2, num_kv_heads, block_size, head_dim], one layer of a pool
    step: GpuStep

    def run(self, backend: "SupportsAttend", window: int | None) -> torch.Tensor:
        """The backend's answer, [num_tokens, num_heads, head_dim]; rows it leaves out are NaN."""
        out = torch.full_like(self.query, torch.nan)
        backend.plan(self.step)
        backend.attend(self.query, self.pages, self.step, out, window)
        return out
