"""The native CPU backend: operations are kernels of `_host`, bound to packed weights.

A call passes two addresses and a row count; everything else was bound when the model was built.
"""

import contextlib
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nodeserve import _host
from nodeserve.config import ModelConfig, MoeConfig
from nodeserve.errors import ModelError
from nodeserve.model import ops, row_ops
from nodeserve.model.expert_parts import Exchange, Mlp, Router, Shared
from nodeserve.model.experts import Experts, OneByOne, make_experts, one_by_one
from nodeserve.model.inputs import StepInputs
from nodeserve.model.kv import KvLayout
from nodeserve.model.mla_cpu import CpuMlaAttention
from nodeserve.model.mla_torch import mla_of
from nodeserve.model.ops import Op, Reduce
from nodeserve.model.quantised import Quantised, Weight, dense, stacked
from nodeserve.model.step_torch import TorchCache, TorchStep, begin_step, cache_over
from nodeserve.model.workspace import Scratch

DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float16: "float16"}
_HUGE_PAGE_BYTES = 2 << 20
_ARENA_BYTES = 64 << 20
_ALIGN_BYTES = 64


class Arena:
    """Memory for packed weights: few large anonymous maps, on huge pages where the system has them.

    Streaming 270 MB through 4 KiB pages spends a tenth of its time on page walks.
    """

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None
        self._used = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8, zeroed, aligned to a cache line."""
        size = -(-num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
        if self._map is None or self._used + size > len(self._map):
            self._map = self._new_map(size)
            self._used = 0
        taken = torch.frombuffer(self._map, dtype=torch.uint8, offset=self._used, count=num_bytes)
        self._used += size
        return taken

    def _new_map(self, num_bytes: int) -> mmap.mmap:
        size = -(-max(num_bytes, _ARENA_BYTES) // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        new = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            new.madvise(mmap.MADV_HUGEPAGE)
        return new


class Bound:
    """A native function of (x, out, rows) and the tensors whose addresses it holds.

    Steps of one size pass the same tensors again, so their addresses are asked for once: with
    caches full of weights, each trip into torch costs a microsecond.
    """

    __slots__ = ("_arguments", "_kept", "_native", "_out", "_x")

    def __init__(self, native: Any, *kept: torch.Tensor | None) -> None:
        self._native = native
        self._kept = kept
        self._x: torch.Tensor | None = None
        self._out: torch.Tensor | None = None
        self._arguments = (0, 0, 0)

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        if x is not self._x or out is not self._out:
            if not x.size(0):  # tensors without rows have no address
                return
            self._x, self._out = x, out
            self._arguments = (x.data_ptr(), out.data_ptr(), x.size(0))
        if self._arguments[2]:  # a tensor without rows has no address
            self._native(*self._arguments)


class FusedAddNorm:
    """Two native functions in a row: into the residual stream, and its norm out of it."""

    __slots__ = ("_add", "_norm")

    def __init__(self, add: Bound, norm: Bound) -> None:
        self._add = add
        self._norm = norm

    def __call__(self, x: torch.Tensor, hidden: torch.Tensor, normed: torch.Tensor) -> None:
        self._add(x, hidden)
        self._norm(hidden, normed)


class CpuAttention:
    """One layer's view of the native attention."""

    __slots__ = ("_addresses", "_kept", "_layer", "_native", "_tensors")

    def __init__(self, native: _host.CpuAttention, layer: int, *kept: torch.Tensor) -> None:
        self._native = native
        self._layer = layer
        self._kept = kept
        self._tensors: tuple[torch.Tensor | None, ...] = (None, None, None)
        self._addresses = (0, 0, 0)

    def store(self, step: _host.CpuPlan, qkv: torch.Tensor, query: torch.Tensor) -> None:
        if qkv is not self._tensors[0] or query is not self._tensors[1]:
            self._tensors = (qkv, query, None)
            self._addresses = (qkv.data_ptr(), query.data_ptr(), 0)
        self._native.store(step, self._layer, self._addresses[0], self._addresses[1])

    def attend(self, step: _host.CpuPlan, query: torch.Tensor, out: torch.Tensor) -> None:
        if query is not self._tensors[1] or out is not self._tensors[2]:
            self._tensors = (self._tensors[0], query, out)
            self._addresses = (self._addresses[0], query.data_ptr(), out.data_ptr())
        self._native.attend(step, self._layer, self._addresses[1], self._addresses[2])


class ReducedAddNorm:
    """The same where the product is a sum over several workers."""

    __slots__ = ("_linear", "_norm", "_products", "_reduce")

    def __init__(self, linear: Bound, reduce: Reduce, norm: Bound, products: Scratch) -> None:
        self._linear = linear
        self._reduce = reduce
        self._norm = norm
        self._products = products

    def __call__(self, x: torch.Tensor, hidden: torch.Tensor, normed: torch.Tensor) -> None:
        product = self._products.rows(*hidden.shape)
        self._linear(x, product)
        self._reduce(product)
        hidden.add_(product)
        self._norm(hidden, normed)


@dataclass(frozen=True, slots=True)
class CpuCache:
    """Pages over a pool that somebody else owns."""

    pages: _host.CpuPages

    @property
    def num_blocks(self) -> int:
        return self.pages.num_blocks


@dataclass(frozen=True, slots=True)
class PackedIntegers:
    """A quantised weight as the kernels read it, or nothing."""

    storage: str = "none"
    groups: torch.Tensor | None = None
    zero: float = 0.0


def refusal(config: ModelConfig, block_size: int) -> str | None:
    """Why the kernels cannot run this shape, or None when they can."""
    if config.mla is not None:
        return None  # attention over latents is torch's, the rest has no conditions
    if config.head_dim % 16 or config.head_dim > 256:
        return f"head_dim {config.head_dim} is not a multiple of 16 up to 256"
    if block_size % 16:
        return f"block size {block_size} is not a multiple of 16"
    return None


class CpuOps:
    """Operations on `num_threads` threads; threads 1.. are pinned to `cpus[1:]` where given.

    `isa` forces an instruction set below the machine's best (`_host.cpu_isas()`), for tests.
    """

    device = torch.device("cpu")
    qkv_dtype = torch.float32

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        num_threads: int = 1,
        cpus: Sequence[int] = (),
        isa: str = "",
    ) -> None:
        self.dtype = dtype
        self.act_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        self.engine = _host.CpuEngine(num_threads, list(cpus), isa)
        self._name = DTYPE_NAMES[dtype]
        self._num_heads = config.num_heads
        self._arena = Arena()
        self._plan = _host.CpuPlan()
        self._products = Scratch(self.device, torch.float32)

    def cache(self, layout: KvLayout, pool: Any) -> CpuCache | TorchCache:
        if layout.planes == 1:
            return cache_over(layout, pool, self.dtype)
        if layout.dtype != self.dtype:
            raise ModelError(f"the pages are {layout.dtype}, the model is {self.dtype}")
        buffer: Any = pool.numpy() if isinstance(pool, torch.Tensor) else pool
        return CpuCache(
            _host.CpuPages(
                buffer,
                layout.num_layers,
                layout.num_kv_heads,
                layout.head_dim,
                layout.block_size,
                self._name,
            )
        )

    def reserve(self, max_tokens: int, max_seqs: int, max_context_len: int) -> None:
        """Nothing: the kernels' scratch is their threads' own."""

    def begin(self, inputs: StepInputs, cache: CpuCache | TorchCache) -> _host.CpuPlan | TorchStep:
        if isinstance(cache, TorchCache):
            return begin_step(inputs, cache, self.device)
        num_seqs, max_blocks = inputs.block_table.shape
        self._plan.prepare(
            self.engine,
            cache.pages,
            self._num_heads,
            inputs.positions.data_ptr(),
            inputs.query_starts.data_ptr(),
            inputs.context_lens.data_ptr(),
            inputs.block_table.data_ptr(),
            inputs.positions.numel(),
            num_seqs,
            max_blocks,
        )
        return self._plan

    def embedding(self, table: Weight) -> Bound:
        rows = dense(table).to(self.dtype).contiguous()
        native = _host.CpuEmbedding(self.engine, self._name, rows.data_ptr(), *rows.shape)
        return Bound(native, rows)

    def rms_norm(self, weight: torch.Tensor, eps: float) -> Bound:
        scale = weight.float().contiguous()
        native = _host.CpuRmsNorm(self.engine, self._name, scale.data_ptr(), scale.numel(), eps)
        return Bound(native, scale)

    def linear(self, weight: Weight, bias: torch.Tensor | None = None) -> Bound:
        return self._linear(weight, "store_f32", bias)

    float_linear = linear  # sums are float32 here

    def linear_add(
        self, weight: Weight, bias: torch.Tensor | None = None, *, reduce: Reduce | None = None
    ) -> Op:
        if reduce is None:
            return self._linear(weight, "add_f32", bias)
        offset = None if bias is None else bias.float()
        return row_ops.add_reduced(self.linear(weight), weight.shape[0], offset, reduce)

    def head(self, weight: Weight) -> Bound:
        return self.linear(weight)

    def linear_add_norm(
        self,
        weight: Weight,
        norm_weight: torch.Tensor,
        eps: float,
        *,
        reduce: Reduce | None = None,
    ) -> ops.AddNorm:
        norm = self.rms_norm(norm_weight, eps)
        if reduce is None:
            return FusedAddNorm(self._linear(weight, "add_f32"), norm)
        return ReducedAddNorm(self.linear(weight), reduce, norm, self._products)

    def add_norm(
        self, norm_weight: torch.Tensor, eps: float, *, reduce: Reduce | None = None
    ) -> ops.AddNorm:
        return row_ops.add_norm(self.rms_norm(norm_weight, eps), reduce)

    def layer_norm(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Op:
        return row_ops.layer_norm(weight.float(), bias.float(), eps)

    def add_positions(self, table: Weight) -> Op:
        return row_ops.add_positions(dense(table).to(self.dtype))

    def linear_relu(self, weight: Weight, bias: torch.Tensor | None = None) -> Op:
        return row_ops.relu_of(self._linear(weight, "store", bias))

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

    def grouped(self, num_mlps: int, mlp: Callable[[int], Mlp]) -> OneByOne:
        return one_by_one(self, num_mlps, mlp)

    def gated(self, gate: Weight, up: Weight) -> Bound:
        return self._linear(stacked([gate, up]), "silu_mul")

    def _linear(self, weight: Weight, epilogue: str, bias: torch.Tensor | None = None) -> Bound:
        n, k = weight.shape
        source = dense(weight).to(self.dtype).contiguous()
        packed = self._arena.take(_host.cpu_packed_bytes(self._name, n, k, epilogue))
        _host.cpu_pack(
            self.engine, self._name, source.data_ptr(), packed.data_ptr(), n, k, epilogue
        )
        small = self._quantised(weight, epilogue)
        offset = None if bias is None else bias.float().contiguous()
        native = _host.CpuLinear(
            self.engine,
            self._name,
            packed.data_ptr(),
            0 if offset is None else offset.data_ptr(),
            n,
            k,
            epilogue,
            small.storage,
            0 if small.groups is None else small.groups.data_ptr(),
            small.zero,
        )
        return Bound(native, packed, small.groups, offset)

    def _quantised(self, weight: Weight, epilogue: str) -> PackedIntegers:
        """The weight a second time for steps of few rows, where its kind and the kernels allow."""
        if not isinstance(weight, Quantised) or weight.dtype != self.dtype:
            return PackedIntegers()
        if self.engine.quantised_rows(self._name) == 0 or (found := weight.integers()) is None:
            return PackedIntegers()
        n, k = weight.shape
        groups = self._arena.take(_host.cpu_quantised_bytes(found.storage, n, k, epilogue))
        _host.cpu_pack_quantised(
            self.engine,
            self._name,
            found.storage,
            found.q.data_ptr(),
            found.scale.data_ptr(),
            0 if found.low is None else found.low.data_ptr(),
            groups.data_ptr(),
            n,
            k,
            epilogue,
        )
        return PackedIntegers(found.storage, groups, found.zero)

    def attention(
        self,
        config: ModelConfig,
        layer: int,
        tables: tuple[torch.Tensor, torch.Tensor],
        qk_norms: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> CpuAttention:
        kept = [*tables, *(norm.float().contiguous() for norm in qk_norms or ())]
        native = _host.CpuAttention(
            self.engine,
            self._name,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.head_dim**-0.5,
            config.window_of(layer) or config.max_position,
            kept[0].data_ptr(),
            kept[1].data_ptr(),
            kept[0].size(0),
            kept[2].data_ptr() if qk_norms else 0,
            kept[3].data_ptr() if qk_norms else 0,
            config.norm_eps,
        )
        return CpuAttention(native, layer, *kept)

    def mla_attention(
        self,
        config: ModelConfig,
        layer: int,
        tables: tuple[torch.Tensor, torch.Tensor],
        kv_norm: torch.Tensor,
        kv_up: Weight,
    ) -> CpuMlaAttention:
        mla = mla_of(config)
        return CpuMlaAttention(
            config,
            layer,
            tables,
            self.rms_norm(kv_norm, mla.norm_eps),
            dense(kv_up),
            self.linear,
            self.act_dtype,
        )
