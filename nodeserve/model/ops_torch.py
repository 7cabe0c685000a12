"""The plain torch backend: any dtype, device and geometry; slow and obvious.

It is the judge of the native kernels in tests and takes over where they refuse a model's shape.
Pages are [num_blocks, num_layers, planes, num_kv_heads, block_size, head_dim].
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from nodeserve.config import ModelConfig, MoeConfig
from nodeserve.model import row_ops
from nodeserve.model.expert_parts import Exchange, Mlp, Router, Shared
from nodeserve.model.experts import Experts, OneByOne, make_experts, one_by_one
from nodeserve.model.inputs import StepInputs
from nodeserve.model.kv import KvLayout
from nodeserve.model.mla_torch import TorchMlaAttention
from nodeserve.model.ops import AddNorm, Op, Reduce
from nodeserve.model.quantised import Weight, dense
from nodeserve.model.step_torch import (
    TorchCache,
    TorchStep,
    attend_pages,
    begin_step,
    cache_over,
    rms_norm,
)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [num_tokens, heads, head_dim]; cos and sin [num_tokens, 1, head_dim / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class TorchAttention:
    """One layer's attention, a sequence at a time, in float32 from what the pages hold."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        tables: tuple[torch.Tensor, torch.Tensor],
        qk_norms: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        self._config = config
        self._layer = layer
        self._cos, self._sin = tables
        self._qk_norms = qk_norms

    def store(self, step: TorchStep, qkv: torch.Tensor, query: torch.Tensor) -> None:
        config = self._config
        heads = qkv.view(qkv.size(0), -1, config.head_dim)
        counts = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        q, k, v = torch.split(heads, counts, dim=1)
        if self._qk_norms is not None:
            q = rms_norm(q, self._qk_norms[0], config.norm_eps)
            k = rms_norm(k, self._qk_norms[1], config.norm_eps)
        cos, sin = self._cos[step.positions, None], self._sin[step.positions, None]
        query.copy_(_rotate(q, cos, sin).flatten(1))
        pages = step.pages[:, self._layer]
        pages[step.blocks, 0, :, step.slots] = _rotate(k, cos, sin).to(pages.dtype)
        pages[step.blocks, 1, :, step.slots] = v.to(pages.dtype)

    def attend(self, step: TorchStep, query: torch.Tensor, out: torch.Tensor) -> None:
        config = self._config
        rows = query.view(query.size(0), config.num_heads, -1).float()
        scale, window = config.head_dim**-0.5, config.window_of(self._layer)
        out.copy_(attend_pages(step, self._layer, rows, scale, window).flatten(1))


class TorchOps:
    """Operations of plain torch."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.dtype = dtype
        self.act_dtype = dtype
        self.qkv_dtype = torch.float32
        self.device = torch.device(device)

    def cache(self, layout: KvLayout, pool: Any) -> TorchCache:
        return cache_over(layout, pool, self.dtype)

    def reserve(self, max_tokens: int, max_seqs: int, max_context_len: int) -> None:
        """Nothing: every operation here makes what it needs."""

    def begin(self, inputs: StepInputs, cache: TorchCache) -> TorchStep:
        return begin_step(inputs, cache, self.device)

    def _own(self, weight: Weight, dtype: torch.dtype) -> torch.Tensor:
        return dense(weight).to(self.device, dtype)

    def embedding(self, table: Weight) -> Op:
        rows = self._own(table, self.dtype)

        def op(x: torch.Tensor, out: torch.Tensor) -> None:
            out.copy_(functional.embedding(x.to(self.device), rows))

        return op

    def rms_norm(self, weight: torch.Tensor, eps: float) -> Op:
        scale = self._own(weight, torch.float32)

        def op(x: torch.Tensor, out: torch.Tensor) -> None:
            out.copy_(rms_norm(x, scale, eps))

        return op

    def linear(self, weight: Weight, bias: torch.Tensor | None = None) -> Op:
        matrix = self._own(weight, self.dtype)
        offset = None if bias is None else self._own(bias, torch.float32)

        def op(x: torch.Tensor, out: torch.Tensor) -> None:
            out.copy_(functional.linear(x, matrix))
            if offset is not None:
                out.add_(offset)

        return op

    def head(self, weight: Weight) -> Op:
        return self.linear(weight)

    def linear_add_norm(
        self,
        weight: Weight,
        norm_weight: torch.Tensor,
        eps: float,
        *,
        reduce: Reduce | None = None,
    ) -> AddNorm:
        matrix = self._own(weight, self.dtype)
        norm = self.rms_norm(norm_weight, eps)

        def op(x: torch.Tensor, hidden: torch.Tensor, normed: torch.Tensor) -> None:
            product = functional.linear(x, matrix)
            if reduce is not None:
                product = product.float()
                reduce(product)
            hidden.add_(product)
            norm(hidden, normed)

        return op

    def gated(self, gate: Weight, up: Weight) -> Op:
        gates, ups = self._own(gate, self.dtype), self._own(up, self.dtype)

        def op(x: torch.Tensor, out: torch.Tensor) -> None:
            hidden = functional.silu(functional.linear(x, gates).float())
            out.copy_(hidden * functional.linear(x, ups))

        return op

    def layer_norm(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Op:
        scale, offset = self._own(weight, torch.float32), self._own(bias, torch.float32)
        return row_ops.layer_norm(scale, offset, eps)

    def linear_add(
        self, weight: Weight, bias: torch.Tensor | None = None, *, reduce: Reduce | None = None
    ) -> Op:
        offset = None if bias is None else self._own(bias, torch.float32)
        return row_ops.add_reduced(self.linear(weight), weight.shape[0], offset, reduce)

    def linear_relu(self, weight: Weight, bias: torch.Tensor | None = None) -> Op:
        return row_ops.relu_of(self.linear(weight, bias))

    def add_positions(self, table: Weight) -> Op:
        return row_ops.add_positions(self._own(table, self.dtype))

    def add_norm(
        self, norm_weight: torch.Tensor, eps: float, *, reduce: Reduce | None = None
    ) -> AddNorm:
        return row_ops.add_norm(self.rms_norm(norm_weight, eps), reduce)

    def experts(
        self,
        moe: MoeConfig,
        layer: int,
        router: Router,
        expert: Callable[[int], Mlp],
        shared: Shared | None = None,
        *,
        exchange: Exchange | None = None,
    ) -> Experts:
        return make_experts(self, moe, router, expert, shared, exchange)

    def float_linear(self, weight: Weight) -> Op:
        matrix = self._own(weight, torch.float32)

        def op(x: torch.Tensor, out: torch.Tensor) -> None:
            torch.mm(x.float(), matrix.t(), out=out)

        return op

    def grouped(self, num_mlps: int, mlp: Callable[[int], Mlp]) -> OneByOne:
        return one_by_one(self, num_mlps, mlp)

    def attention(
        self,
        config: ModelConfig,
        layer: int,
        tables: tuple[torch.Tensor, torch.Tensor],
        qk_norms: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> TorchAttention:
        on_device = (tables[0].to(self.device), tables[1].to(self.device))
        norms = None
        if qk_norms is not None:
            q, k = (self._own(norm, torch.float32) for norm in qk_norms)
            norms = (q, k)
        return TorchAttention(config, layer, on_device, norms)

    def mla_attention(
        self,
        config: ModelConfig,
        layer: int,
        tables: tuple[torch.Tensor, torch.Tensor],
        kv_norm: torch.Tensor,
        kv_up: Weight,
    ) -> TorchMlaAttention:
        on_device = (tables[0].to(self.device), tables[1].to(self.device))
        norm, up = (self._own(weight, torch.float32) for weight in (kv_norm, kv_up))
        return TorchMlaAttention(config, layer, on_device, norm, up)
