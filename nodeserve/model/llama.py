"""Llama 2 and 3, SmolLM2, Mistral, Qwen2 and Qwen3: one decoder, driven by its ModelConfig.

    hidden = embed(token_ids);  normed = norm(hidden)
    per layer:  hidden += out_proj(attention(rotate(qkv(normed))));     normed = norm(hidden)
                hidden += down(silu(gate(normed)) * up(normed));        normed = norm(hidden)
    logits = head(normed)

Each half layer ends with the norm that comes next, so that a device can fuse the two; a layer's
last is the next layer's input norm, and the last layer's is the model's own.

Shapes: hidden [num_tokens, hidden_size] float32, the residual stream; everything that enters a
linear is `act` (see ops). Written against `Ops`: knows no device, no page and no weight format.
After the last attention only the rows whose logits are wanted go on. A step reads no tensor on
the host, and after `reserve` it allocates nothing: what a CUDA graph asks for.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from nodeserve.config import ModelConfig
from nodeserve.model import rotary
from nodeserve.model.inputs import StepInputs
from nodeserve.model.ops import Ops
from nodeserve.model.quantised import Weight, dense, stacked

Weights = Callable[[str], Weight]  # by hub name, e.g. "model.layers.0.mlp.up_proj.weight"
Progress = Callable[[int, int], None]  # parts done, parts in all


class Buffers(NamedTuple):
    """A step's activations; every layer writes over the last one's."""

    hidden: torch.Tensor  # [rows, hidden_size] float32
    normed: torch.Tensor  # [rows, hidden_size] act
    qkv: torch.Tensor  # [rows, (num_heads + 2 * num_kv_heads) * head_dim] Ops.qkv_dtype
    query: torch.Tensor  # [rows, num_heads * head_dim] act
    attended: torch.Tensor  # [rows, num_heads * head_dim] act
    gated: torch.Tensor  # [rows, intermediate_size] act
    logits: torch.Tensor  # [rows, vocab_size] float32


class Workspace:
    """Buffers for any number of rows, kept between steps and grown until they are reserved."""

    def __init__(self, config: ModelConfig, ops: Ops, with_logits: bool) -> None:
        heads = config.num_heads * config.head_dim
        qkv = heads + 2 * config.num_kv_heads * config.head_dim
        act, f32 = ops.act_dtype, torch.float32
        self._columns = [
            (config.hidden_size, f32),
            (config.hidden_size, act),
            (qkv, ops.qkv_dtype),
            (heads, act),
            (heads, act),
            (config.intermediate_size, act),
            (config.vocab_size if with_logits else 0, f32),
        ]
        self._device = ops.device
        self._whole: list[torch.Tensor] = []
        self._capacity = 0
        self._fixed = False
        self._views: dict[int, Buffers] = {}

    def reserve(self, max_rows: int) -> None:
        """Room for `max_rows`, for good: captured graphs hold these addresses."""
        if max_rows > self._capacity:
            self._grow(max_rows)
        self._fixed = True

    def rows(self, num_rows: int) -> Buffers:
        views = self._views.get(num_rows)
        if views is None:
            if num_rows > self._capacity:
                self._grow(num_rows)
            views = Buffers(*(whole[:num_rows] for whole in self._whole))
            self._views[num_rows] = views
        return views

    def _grow(self, num_rows: int) -> None:
        assert not self._fixed, f"{num_rows} rows, reserved are {self._capacity}"
        self._capacity = max(num_rows, 2 * self._capacity)
        self._views.clear()
        self._whole = [
            torch.zeros(self._capacity, width, dtype=dtype, device=self._device)
            for width, dtype in self._columns
        ]


class Mlp:
    """The MLP of one layer, which every row passes."""

    def __init__(
        self, config: ModelConfig, index: int, weights: Weights, ops: Ops, next_norm: torch.Tensor
    ) -> None:
        def get(name: str) -> Weight:
            return weights(f"model.layers.{index}.mlp.{name}_proj.weight")

        self.gated = ops.gated(get("gate"), get("up"))
        self.down = ops.linear_add_norm(get("down"), next_norm, config.norm_eps)

    def __call__(self, work: Buffers) -> None:
        """hidden += mlp(normed); normed = next_norm(hidden)"""
        self.gated(work.normed, work.gated)
        self.down(work.gated, work.hidden, work.normed)


# What ends a layer: made as Mlp is, for the families that have something else there.
MakeMlp = Callable[[ModelConfig, int, Weights, Ops, torch.Tensor], Callable[[Buffers], None]]


class Layer:
    """One decoder layer, in two halves: what needs every row, and what a row does alone."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        weights: Weights,
        ops: Ops,
        tables: tuple[torch.Tensor, torch.Tensor],
        next_norm: torch.Tensor,
        make_mlp: MakeMlp,
    ) -> None:
        def get(name: str) -> Weight:
            return weights(f"model.layers.{index}.{name}")

        def qkv(kind: str) -> Weight:
            return stacked([get(f"self_attn.{name}_proj.{kind}") for name in "qkv"])

        norms = None
        if config.qk_norm:
            norms = (dense(get("self_attn.q_norm.weight")), dense(get("self_attn.k_norm.weight")))
        bias = dense(qkv("bias")) if config.attention_bias else None
        self.qkv = ops.linear(qkv("weight"), bias)
        self.attention = ops.attention(config, index, tables, norms)
        middle_norm = dense(get("post_attention_layernorm.weight"))
        self.out_proj = ops.linear_add_norm(
            get("self_attn.o_proj.weight"), middle_norm, config.norm_eps
        )
        self.mlp = make_mlp(config, index, weights, ops, next_norm)

    def attend(self, work: Buffers, step: Any) -> None:
        self.qkv(work.normed, work.qkv)
        self.attention.store(step, work.qkv, work.query)
        self.attention.attend(step, work.query, work.attended)

    def finish(self, work: Buffers) -> None:
        self.out_proj(work.attended, work.hidden, work.normed)
        self.mlp(work)


class Llama:
    """A decoder with its weights bound to `ops`. Made by build()."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        ops: Ops,
        progress: Progress,
        make_mlp: MakeMlp = Mlp,
    ) -> None:
        self.config = config
        self._ops = ops
        self._work = Workspace(config, ops, with_logits=False)
        self._tail = Workspace(config, ops, with_logits=True)
        tables = rotary.tables(config)
        total = config.num_layers + 1
        table = weights("model.embed_tokens.weight")
        self.embed = ops.embedding(table)
        self.head = ops.linear(table if config.tie_embeddings else weights("lm_head.weight"))
        norms = [f"model.layers.{index}.input_layernorm" for index in range(config.num_layers)]
        self.first_norm = ops.rms_norm(dense(weights(f"{norms[0]}.weight")), config.norm_eps)
        progress(1, total)
        self.layers = []
        for index, next_norm in enumerate([*norms[1:], "model.norm"]):
            next_weight = dense(weights(f"{next_norm}.weight"))
            self.layers.append(Layer(config, index, weights, ops, tables, next_weight, make_mlp))
            progress(index + 2, total)

    def reserve(
        self, max_tokens: int, max_logit_rows: int, max_seqs: int, max_context_len: int
    ) -> None:
        """Memory for steps up to these sizes; a larger one is refused from now on."""
        self._work.reserve(max_tokens)
        self._tail.reserve(max_logit_rows)
        self._ops.reserve(max_tokens, max_seqs, max_context_len)

    @torch.inference_mode()
    def forward(self, inputs: StepInputs, cache: Any) -> torch.Tensor:
        """Logits [num_logits, vocab_size] float32, in a buffer that the next call overwrites."""
        step = self._ops.begin(inputs, cache)
        work = self._work.rows(inputs.token_ids.numel())
        self.embed(inputs.token_ids, work.hidden)
        self.first_norm(work.hidden, work.normed)
        for layer in self.layers[:-1]:
            layer.attend(work, step)
            layer.finish(work)
        self.layers[-1].attend(work, step)
        return self._logits(work, inputs.logit_rows)

    def _logits(self, work: Buffers, rows: torch.Tensor) -> torch.Tensor:
        tail = self._tail.rows(rows.numel())
        if rows.numel() == 0:
            return tail.logits
        torch.index_select(work.hidden, 0, rows, out=tail.hidden)
        torch.index_select(work.attended, 0, rows, out=tail.attended)
        self.layers[-1].finish(tail)
        self.head(tail.normed, tail.logits)
        return tail.logits


def build(config: ModelConfig, weights: Weights, ops: Ops, progress: Progress) -> Llama:
    """Bind the weights to `ops`."""
    return Llama(config, weights, ops, progress)


def shape_of(config: ModelConfig, name: str) -> tuple[int, ...] | None:
    """The shape of the tensor that the hub calls `name`; None if the model has none."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    whole = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_embeddings:
        whole["lm_head.weight"] = (vocab, hidden)
    if name in whole:
        return whole[name]
    part = part_of_layer(config, name)
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (heads, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, heads),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.attention_bias:
        rows = {"q": heads, "k": kv, "v": kv}
        layer |= {f"self_attn.{one}_proj.bias": (rows[one],) for one in rows}
    if config.qk_norm:
        layer |= {f"self_attn.{one}_norm.weight": (config.head_dim,) for one in "qk"}
    return layer.get(part)


def part_of_layer(config: ModelConfig, name: str, where: str = "model.layers.") -> str:
    """What follows "model.layers.N." for a layer that exists, else nothing."""
    prefix, _, rest = name.partition(where)
    number, _, part = rest.partition(".")
    known = not prefix and number.isdecimal() and int(number) < config.num_layers
    return part if known else ""
