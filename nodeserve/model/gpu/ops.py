"""The GPU backend: torch's matrix products, Triton kernels around them, attention by a backend.

Weights lie on the device in the model's dtype, gate above up in one matrix. A linear that ends a
half layer writes to scratch, and one kernel adds that to the residual stream and norms it.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

from nodeserve.config import ModelConfig, MoeConfig
from nodeserve.errors import ModelError
from nodeserve.model import row_ops
from nodeserve.model.expert_parts import Exchange, Mlp, Router, Shared
from nodeserve.model.experts import Experts, make_experts
from nodeserve.model.gpu import norm, pointwise, rope
from nodeserve.model.gpu.experts import GpuGrouped
from nodeserve.model.gpu.mla import GpuMlaAttention
from nodeserve.model.gpu.step import AttentionBackend, GpuPass, GpuStep
from nodeserve.model.inputs import StepInputs
from nodeserve.model.kv import KvLayout, pages_over
from nodeserve.model.ops import AddNorm, Op, Reduce
from nodeserve.model.quantised import Weight, dense
from nodeserve.model.workspace import Scratch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class GpuCache:
    """Pages over a pool that somebody else owns."""

    # [num_blocks, num_layers, planes, num_kv_heads, block_size, head_dim] act
    pages: torch.Tensor
    # Per layer [num_blocks, planes, num_kv_heads, block_size, head_dim].
    layers: tuple[torch.Tensor, ...]

    @property
    def num_blocks(self) -> int:
        return self.pages.size(0)


class GpuAttention:
    """One layer's attention."""

    def __init__(
        self,
        backend: AttentionBackend,
        config: ModelConfig,
        layer: int,
        tables: tuple[torch.Tensor, torch.Tensor],
        qk_norms: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        self._backend = backend
        self._layer = layer
        self._tables = tables
        self._qk_norms = qk_norms
        self._eps = config.norm_eps
        self._head_dim = config.head_dim
        self._window = config.window_of(layer)

    def store(self, begun: GpuPass, qkv: torch.Tensor, query: torch.Tensor) -> None:
        step, pages = begun.step, begun.layers[self._layer]
        rope.rope_store(
            qkv, step.positions, step.slots, self._tables, self._qk_norms, query, pages, self._eps
        )

    def attend(self, begun: GpuPass, query: torch.Tensor, out: torch.Tensor) -> None:
        shape = (query.size(0), -1, self._head_dim)
        pages = begun.layers[self._layer]
        self._backend.attend(query.view(shape), pages, begun.step, out.view(shape), self._window)


class CudaOps:
    """Operations on one GPU, on torch's current stream.

    `device` may be a CPU where Triton interprets its kernels: slow, and what the tests do.
    """

    def __init__(
        self, dtype: torch.dtype, device: torch.device | str, attention: AttentionBackend
    ) -> None:
        self.device = torch.device(device)
        if dtype not in DTYPES:
            raise ModelError(f"dtype {dtype} is not supported on GPUs; use one of {DTYPES}")
        if self.device.type == "cpu" and not triton.knobs.runtime.interpret:
            raise ModelError("GPU operations run on a CPU only under TRITON_INTERPRET=1")
        self.dtype = dtype
        self.act_dtype = dtype
        self.qkv_dtype = dtype
        self._backend = attention
        self._scratch = Scratch(self.device, dtype)
        self._slots = torch.empty(0, dtype=torch.int32, device=self.device)
        self._fixed = False
        self._table: tuple[weakref.ref[Weight], torch.Tensor] | None = None
        self._rotary: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None = None

    # ---- a step

    def cache(self, layout: KvLayout, pool: torch.Tensor) -> GpuCache:
        """Pages over `pool`, [num_bytes] uint8 on the device."""
        if layout.dtype != self.dtype:
            raise ModelError(f"the pages are {layout.dtype}, the model is {self.dtype}")
        pages = pages_over(layout, pool)
        return GpuCache(pages, pages.unbind(1))

    def reserve(self, max_tokens: int, max_seqs: int, max_context_len: int) -> None:
        self._scratch.reserve(max_tokens)
        self._room_for_slots(max_tokens)
        self._fixed = True
        self._backend.reserve(max_tokens, max_seqs, max_context_len)

    def begin(self, inputs: StepInputs, cache: GpuCache) -> GpuPass:
        self._refuse_beyond_tables(inputs.max_context_len)
        num_tokens = inputs.positions.numel()
        self._room_for_slots(num_tokens)
        step = GpuStep(
            token_ids=inputs.token_ids,
            positions=inputs.positions,
            slots=self._slots[:num_tokens],
            query_starts=inputs.query_starts,
            context_lens=inputs.context_lens,
            block_table=inputs.block_table,
            num_decodes=inputs.num_decodes,
            max_query_len=inputs.max_query_len,
            max_context_len=inputs.max_context_len,
        )
        rope.find_slots(
            step.query_starts,
            step.positions,
            step.block_table,
            step.slots,
            step.max_query_len,
            cache.pages.size(4),
        )
        self._backend.plan(step)
        return GpuPass(step, cache.layers)

    def _refuse_beyond_tables(self, max_context_len: int) -> None:
        """The rotation's kernel would read past the end of its tables."""
        if self._rotary is not None and max_context_len > (end := self._rotary[1][0].size(0)):
            raise ModelError(
                f"a context of {max_context_len} tokens is above the model's {end} positions: "
                "lower --max-model-len"
            )

    def _room_for_slots(self, num_tokens: int) -> None:
        if num_tokens > self._slots.numel():
            assert not self._fixed, f"{num_tokens} tokens, reserved are {self._slots.numel()}"
            self._slots = self._slots.new_empty(num_tokens)

    # ---- operations bound to their weights

    def embedding(self, table: Weight) -> Op:
        rows = self._own(table)
        self._table = (weakref.ref(table), rows)

        def op(x: torch.Tensor, out: torch.Tensor) -> None:
            pointwise.embedding(x, rows, out)

        return op

    def rms_norm(self, weight: torch.Tensor, eps: float) -> Op:
        scale = self._own(weight, torch.float32)

        def op(x: torch.Tensor, out: torch.Tensor) -> None:
            norm.rms_norm(x, scale, out, eps)

        return op

    def linear(self, weight: Weight, bias: torch.Tensor | None = None) -> Op:
        matrix = self._matrix(weight)
        self._scratch.need(matrix.size(0) if self._copies_logits else 0)
        if bias is None:
            return lambda x, out: self._product(x, matrix, out)
        offset = self._own(bias)

        def op(x: torch.Tensor, out: torch.Tensor) -> None:
            torch.addmm(offset, x, matrix.t(), out=out)

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
        matrix, scale = self._own(weight), self._own(norm_weight, torch.float32)
        width = matrix.size(0)
        self._scratch.need(width)

        def op(x: torch.Tensor, hidden: torch.Tensor, normed: torch.Tensor) -> None:
            delta = self._scratch.rows(x.size(0), width)
            torch.mm(x, matrix.t(), out=delta)
            if reduce is not None:
                reduce(delta)
            norm.add_rms_norm(delta, hidden, scale, normed, eps)

        return op

    def gated(self, gate: Weight, up: Weight) -> Op:
        n, k = gate.shape
        both = torch.empty(2 * n, k, dtype=self.dtype, device=self.device)
        both[:n].copy_(dense(gate))
        both[n:].copy_(dense(up))
        self._scratch.need(2 * n)

        def op(x: torch.Tensor, out: torch.Tensor) -> None:
            gate_up = self._scratch.rows(x.size(0), 2 * n)
            torch.mm(x, both.t(), out=gate_up)
            pointwise.silu_mul(gate_up, out)

        return op

    def linear_add(
        self, weight: Weight, bias: torch.Tensor | None = None, *, reduce: Reduce | None = None
    ) -> Op:
        matrix = self._own(weight)
        offset = None if bias is None else self._own(bias, torch.float32)
        self._scratch.need(matrix.size(0))

        def op(x: torch.Tensor, out: torch.Tensor) -> None:
            delta = self._scratch.rows(x.size(0), matrix.size(0))
            torch.mm(x, matrix.t(), out=delta)
            if reduce is not None:
                reduce(delta)
            out.add_(delta)
            if offset is not None:
                out.add_(offset)

        return op

    def linear_relu(self, weight: Weight, bias: torch.Tensor | None = None) -> Op:
        return row_ops.relu_of(self.linear(weight, bias))

    def layer_norm(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Op:
        scale, offset = self._own(weight, torch.float32), self._own(bias, torch.float32)
        return row_ops.layer_norm(scale, offset, eps)

    def add_positions(self, table: Weight) -> Op:
        return row_ops.add_positions(self._own(table))

    def add_norm(
        self, norm_weight: torch.Tensor, eps: float, *, reduce: Reduce | None = None
    ) -> AddNorm:
        scale = self._own(norm_weight, torch.float32)

        def op(x: torch.Tensor, hidden: torch.Tensor, normed: torch.Tensor) -> None:
            if reduce is not None:
                reduce(x)
            norm.add_rms_norm(x, hidden, scale, normed, eps)

        return op

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
        if router.bias is not None:
            router = router._replace(bias=self._own(router.bias, torch.float32))
        return make_experts(self, moe, router, expert, shared, exchange)

    def float_linear(self, weight: Weight) -> Op:
        matrix = self._own(weight, torch.float32)

        def op(x: torch.Tensor, out: torch.Tensor) -> None:
            torch.mm(x.float(), matrix.t(), out=out)

        return op

    def grouped(self, num_mlps: int, mlp: Callable[[int], Mlp]) -> GpuGrouped:
        return GpuGrouped(num_mlps, mlp, self.dtype, self.device)

    def attention(
        self,
        config: ModelConfig,
        layer: int,
        tables: tuple[torch.Tensor, torch.Tensor],
        qk_norms: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> GpuAttention:
        norms = None
        if qk_norms is not None:
            q, k = (self._own(weight, torch.float32) for weight in qk_norms)
            norms = (q, k)
        return GpuAttention(self._backend, config, layer, self._shared(tables), norms)

    def mla_attention(
        self,
        config: ModelConfig,
        layer: int,
        tables: tuple[torch.Tensor, torch.Tensor],
        kv_norm: torch.Tensor,
        kv_up: Weight,
    ) -> GpuMlaAttention:
        norm, up = self._own(kv_norm, torch.float32), self._own(kv_up)
        turn = self._shared(tables)
        return GpuMlaAttention(self._backend, config, layer, turn, norm, up, self._scratch)

    # ---- weights

    @property
    def _copies_logits(self) -> bool:
        """Only CUDA's product has float32 results of 16-bit factors."""
        return self.device.type != "cuda"

    def _product(self, x: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor) -> None:
        """out = x matrix^T, in act or float32"""
        if out.dtype == x.dtype:
            torch.mm(x, matrix.t(), out=out)
        elif self._copies_logits:
            result = self._scratch.rows(x.size(0), matrix.size(0))
            torch.mm(x, matrix.t(), out=result)
            out.copy_(result)
        else:
            torch.ops.aten.mm.dtype_out(x, matrix.t(), out.dtype, out=out)

    def _own(self, weight: Weight, dtype: torch.dtype | None = None) -> torch.Tensor:
        return dense(weight).to(self.device, dtype or self.dtype).contiguous()

    def _matrix(self, weight: Weight) -> torch.Tensor:
        """A tied head is the embedding's table: one copy on the device."""
        if self._table is not None and self._table[0]() is weight:
            return self._table[1]
        return self._own(weight)

    def _shared(
        self, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All layers turn by the same tables: one copy of those too."""
        if self._rotary is None or self._rotary[0] is not tables[0]:
            cos, sin = (self._own(table, torch.float32) for table in tables)
            self._rotary = (tables[0], (cos, sin))
        return self._rotary[1]
