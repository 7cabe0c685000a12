"""The operations a decoder is written in. A backend is one class that makes them.

Every operation writes into a tensor that it is given, so a step allocates nothing. `act` is
`Ops.act_dtype`, the type that goes into linears; the residual stream is always float32.

What ends a half layer and the norm that begins the next one are one operation, `linear_add_norm`: a
GPU then reads and writes the residual stream once for both.

Matrices come as tensors or as a file quantised them; a backend that cannot use the latter makes
them `dense`.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from nodeserve.config import ModelConfig, MoeConfig
from nodeserve.model.expert_parts import Exchange, Mlp, Router, Shared
from nodeserve.model.inputs import StepInputs
from nodeserve.model.kv import KvLayout
from nodeserve.model.quantised import Weight

Reduce = Callable[[torch.Tensor], None]
"""x [rows, n] float32 or act -> the sum of all tensor ranks' x, in place, the same bits on each"""


class Op(Protocol):
    """A function of rows: reads x [rows, ...], writes out [rows, ...]."""

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None: ...


class AddNorm(Protocol):
    """Reads x [rows, k] act, adds to hidden [rows, n] float32, writes normed [rows, n] act."""

    def __call__(self, x: torch.Tensor, hidden: torch.Tensor, normed: torch.Tensor) -> None: ...


class Attention(Protocol):
    """One layer's attention over the pages."""

    def store(self, step: Any, qkv: torch.Tensor, query: torch.Tensor) -> None:
        """Normalise (if the model does) and rotate q and k, write k and v to their pages.

        qkv [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim] of Ops.qkv_dtype
        query [num_tokens, num_heads * head_dim] act, written
        """

    def attend(self, step: Any, query: torch.Tensor, out: torch.Tensor) -> None:
        """query and out [num_tokens, num_heads * head_dim] act"""


class MlaAttention(Protocol):
    """One layer's latent attention: what `Attention` is where pages hold latents (see MlaConfig).

    Scores come from the latents themselves: the matrix that makes keys of them is multiplied into
    the queries, the one that makes values into what attention gives.
    """

    def store(
        self, step: Any, heads: torch.Tensor, latent: torch.Tensor, query: torch.Tensor
    ) -> None:
        """Norm and rotate the latents, write them to their pages, make queries for them.

        heads [num_tokens, num_heads * (qk_nope_head_dim + qk_rope_head_dim)] of Ops.qkv_dtype
        latent [num_tokens, kv_lora_rank + qk_rope_head_dim] of Ops.qkv_dtype
        query [num_tokens, num_heads * (kv_lora_rank + qk_rope_head_dim)] act, written
        """

    def attend(self, step: Any, query: torch.Tensor, out: torch.Tensor) -> None:
        """query as `store` left it, out [num_tokens, num_heads * v_head_dim] act"""


class Ops(Protocol):
    """A backend: device, types, and the operations bound to their weights."""

    dtype: torch.dtype  # of weights and pages
    act_dtype: torch.dtype
    qkv_dtype: torch.dtype  # what the qkv linear writes and `Attention.store` reads
    device: torch.device

    def cache(self, layout: KvLayout, pool: Any) -> Any:
        """Pages over `pool`, a writable zeroed buffer (mmap, memoryview or uint8 tensor)."""

    def reserve(self, max_tokens: int, max_seqs: int, max_context_len: int) -> None:
        """Scratch for steps up to these sizes; afterwards no operation makes any."""

    def begin(self, inputs: StepInputs, cache: Any) -> Any:
        """What all layers of a step share. Valid until the next begin."""

    def embedding(self, table: Weight) -> Op:
        """table [vocab, hidden]: token ids [rows] int32 -> out [rows, hidden] float32"""

    def rms_norm(self, weight: torch.Tensor, eps: float) -> Op:
        """x [rows, hidden] float32 -> out [rows, hidden] act"""

    def linear(self, weight: Weight, bias: torch.Tensor | None = None) -> Op:
        """weight [n, k]: x [rows, k] act -> out [rows, n] float32 or qkv_dtype"""

    def head(self, weight: Weight) -> Op:
        """weight [vocab, k]: x [rows, k] act -> logits [rows, vocab] float32"""

    def linear_add_norm(
        self,
        weight: Weight,
        norm_weight: torch.Tensor,
        eps: float,
        *,
        reduce: Reduce | None = None,
    ) -> AddNorm:
        """weight [n, k]: hidden += reduce(x weight^T); normed = rms_norm(hidden) * norm_weight

        `reduce` where ranks hold columns of the weight, each with its part of x.
        """

    def gated(self, gate: Weight, up: Weight) -> Op:
        """gate, up [n, k]: x [rows, k] act -> out [rows, n] act = silu(x gate) * (x up)"""

    def layer_norm(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Op:
        """x [rows, hidden] float32 -> out [rows, hidden] act or float32, which may be x"""

    def linear_add(
        self, weight: Weight, bias: torch.Tensor | None = None, *, reduce: Reduce | None = None
    ) -> Op:
        """weight [n, k]: x [rows, k] act, out [rows, n] float32 += reduce(x weight^T) + bias"""

    def linear_relu(self, weight: Weight, bias: torch.Tensor | None = None) -> Op:
        """weight [n, k]: x [rows, k] act -> out [rows, n] act = max(x weight^T + bias, 0)"""

    def add_positions(self, table: Weight) -> Op:
        """table [positions, hidden]: positions [rows] int32, added to out [rows, hidden] float32"""

    def experts(
        self,
        moe: MoeConfig,
        layer: int,
        router: Router,
        expert: Callable[[int], Mlp],
        shared: Shared | None = None,
        *,
        exchange: Exchange | None = None,
    ) -> Op:
        """x [rows, hidden] act -> out [rows, hidden] float32, what all experts of a row add up to.

        `expert(i)` is asked, once each and in order, for those that this worker holds: all, or its
        part of what `exchange` says. With one, all of its ranks call this together. By `layer`,
        which counts in the whole model, parallel.py knows who holds them.
        """

    def add_norm(
        self, norm_weight: torch.Tensor, eps: float, *, reduce: Reduce | None = None
    ) -> AddNorm:
        """x [rows, n] float32: hidden += reduce(x); normed = rms_norm(hidden) * norm_weight"""

    def attention(
        self,
        config: ModelConfig,
        layer: int,
        tables: tuple[torch.Tensor, torch.Tensor],
        qk_norms: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> Attention:
        """tables: cos and sin [max_position, head_dim / 2] float32; qk_norms: [head_dim] each"""

    def mla_attention(
        self,
        config: ModelConfig,
        layer: int,
        tables: tuple[torch.Tensor, torch.Tensor],
        kv_norm: torch.Tensor,
        kv_up: Weight,
    ) -> MlaAttention:
        """tables: cos and sin [max_position, qk_rope_head_dim / 2] float32

        kv_norm [kv_lora_rank]; kv_up [num_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank],
        per head the rows that make its keys of a latent, then those that make its values
        """
