"""The plain torch backend: any dtype, device and geometry; slow and obvious.

It is the judge of the native kernels in tests and takes over where they refuse a model's shape.
Pages are [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim].
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from nodeserve.config import ModelConfig
from nodeserve.errors import ModelError
from nodeserve.model.inputs import StepInputs
from nodeserve.model.kv import KvLayout, pages_over
from nodeserve.model.ops import AddNorm, Op, Reduce
from nodeserve.model.quantised import Weight, dense


@dataclass(frozen=True, slots=True)
class TorchCache:
    """Pages over a pool that somebody else owns."""

    pages: torch.Tensor  # [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]

    @property
    def num_blocks(self) -> int:
        return self.pages.size(0)


@dataclass(frozen=True, slots=True)
class TorchStep:
    """One step's geometry on the device."""

    pages: torch.Tensor
    positions: torch.Tensor  # [num_tokens] int64
    blocks: torch.Tensor  # [num_tokens] int64: block of each token
    slots: torch.Tensor  # [num_tokens] int64: place inside it
    spans: list[tuple[int, int, int]]  # per sequence: first row, end row, context length
    block_table: torch.Tensor  # [num_seqs, max_blocks] int64


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


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
            q = _rms_norm(q, self._qk_norms[0], config.norm_eps)
            k = _rms_norm(k, self._qk_norms[1], config.norm_eps)
        cos, sin = self._cos[step.positions, None], self._sin[step.positions, None]
        query.copy_(_rotate(q, cos, sin).flatten(1))
        pages = step.pages[:, self._layer]
        pages[step.blocks, 0, :, step.slots] = _rotate(k, cos, sin).to(pages.dtype)
        pages[step.blocks, 1, :, step.slots] = v.to(pages.dtype)

    def attend(self, step: TorchStep, query: torch.Tensor, out: torch.Tensor) -> None:
        for seq, (first, last, context) in enumerate(step.spans):
            rows = query[first:last].view(last - first, self._config.num_heads, -1)
            seen = self._one_sequence(step, seq, rows.float(), context)
            out[first:last].copy_(seen.flatten(1))

    def _one_sequence(
        self, step: TorchStep, seq: int, rows: torch.Tensor, context: int
    ) -> torch.Tensor:
        """rows and result [tokens, num_heads, head_dim] float32, the last ones of `context`."""
        config = self._config
        block_size = step.pages.size(4)
        blocks = step.block_table[seq, : -(-context // block_size)]
        pages = step.pages[blocks, self._layer].permute(1, 2, 0, 3, 4)  # [2, kv, blocks, size, dim]
        keys, values = pages.flatten(2, 3)[:, :, :context].float()
        group = config.num_heads // config.num_kv_heads
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        scores = torch.einsum("thd,hcd->htc", rows, keys) * config.head_dim**-0.5
        row = torch.arange(context - rows.size(0), context, device=rows.device)[:, None]
        distance = row - torch.arange(context, device=rows.device)
        window = config.window_of(self._layer) or context
        scores.masked_fill_((distance < 0) | (distance >= window), -torch.inf)
        return torch.einsum("htc,hcd->thd", scores.softmax(-1), values)


class TorchOps:
    """Operations of plain torch."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.dtype = dtype
        self.act_dtype = dtype
        self.qkv_dtype = torch.float32
        self.device = torch.device(device)

    def cache(self, layout: KvLayout, pool: Any) -> TorchCache:
        if layout.dtype != self.dtype:
            raise ModelError(f"the pages are {layout.dtype}, the model is {self.dtype}")
        raw = pool if isinstance(pool, torch.Tensor) else torch.frombuffer(pool, dtype=torch.uint8)
        return TorchCache(pages_over(layout, raw))

    def reserve(self, max_tokens: int, max_seqs: int, max_context_len: int) -> None:
        """Nothing: every operation here makes what it needs."""

    def begin(self, inputs: StepInputs, cache: TorchCache) -> TorchStep:
        starts, contexts = inputs.query_starts.tolist(), inputs.context_lens.tolist()
        spans = list(zip(starts, starts[1:], contexts, strict=False))
        positions = inputs.positions.to(self.device, torch.int64)
        table = inputs.block_table.to(self.device, torch.int64)
        counts = inputs.query_starts.diff().to(self.device, torch.int64)
        seqs = torch.repeat_interleave(torch.arange(len(spans), device=self.device), counts)
        block_size = cache.pages.size(4)
        blocks = table[seqs, positions // block_size]
        return TorchStep(cache.pages, positions, blocks, positions % block_size, spans, table)

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
            out.copy_(_rms_norm(x, scale, eps))

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
        self, weight: Weight, norm_weight: torch.Tensor, eps: float, reduce: Reduce | None = None
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
