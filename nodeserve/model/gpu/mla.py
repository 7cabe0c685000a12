"""One layer's latent attention on a GPU: the kernels, and products with the absorbed matrices."""

import torch

from nodeserve.config import ModelConfig
from nodeserve.model.gpu.latent import latent_store
from nodeserve.model.gpu.step import AttentionBackend, GpuPass
from nodeserve.model.mla_torch import mla_of, split_up
from nodeserve.model.workspace import Scratch


class GpuMlaAttention:
    """See `Ops.mla_attention`; `backend` reads latents, with scores scaled as the model says."""

    def __init__(
        self,
        backend: AttentionBackend,
        config: ModelConfig,
        layer: int,
        tables: tuple[torch.Tensor, torch.Tensor],
        kv_norm: torch.Tensor,
        kv_up: torch.Tensor,
        scratch: Scratch,
    ) -> None:
        """On the device: tables and kv_norm in float32, kv_up in act."""
        self._backend = backend
        self._mla = mla_of(config)
        self._num_heads = config.num_heads
        self._layer = layer
        self._tables = tables
        self._norm = kv_norm
        self._keys, self._values = split_up(config, kv_up)
        self._scratch = scratch
        scratch.need(config.num_heads * self._mla.kv_lora_rank)

    def store(
        self, begun: GpuPass, heads: torch.Tensor, latent: torch.Tensor, query: torch.Tensor
    ) -> None:
        mla, step, pages = self._mla, begun.step, begun.layers[self._layer]
        latent_store(
            heads, latent, step.positions, step.slots, self._tables, self._norm, query, pages, mla
        )
        plain = self._by_head(heads)[:, :, : mla.qk_nope_head_dim]
        absorbed = self._by_head(query)[:, :, : mla.kv_lora_rank]
        torch.bmm(plain, self._keys, out=absorbed)

    def attend(self, begun: GpuPass, query: torch.Tensor, out: torch.Tensor) -> None:
        rank, rows = self._mla.kv_lora_rank, query.size(0)
        seen = self._scratch.rows(rows, self._num_heads * rank)
        self._backend.attend(
            query.view(rows, self._num_heads, -1),
            begun.layers[self._layer],
            begun.step,
            seen.view(rows, self._num_heads, rank),
            None,
        )
        torch.bmm(self._by_head(seen), self._values, out=self._by_head(out))

    def _by_head(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [num_tokens, num_heads * n] as [num_heads, num_tokens, n], strided: cuBLAS reads and
        writes it as it lies."""
        return rows.view(rows.size(0), self._num_heads, -1).transpose(0, 1)
