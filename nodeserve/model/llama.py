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
from typing import Any, NamedTuple, Protocol

import torch

from nodeserve.config import ModelConfig
from nodeserve.model import rotary
from nodeserve.model.decoder import Decoder, Progress, Stage, Weights, assemble
from nodeserve.model.ops import Ops
from nodeserve.model.quantised import Weight, dense, stacked
from nodeserve.model.workspace import Workspace
from nodeserve.shards import Axis, Cut

CUTS = {
    "q_proj": Cut(0, Axis.HEADS),
    "k_proj": Cut(0, Axis.KV_HEADS),
    "v_proj": Cut(0, Axis.KV_HEADS),
    "o_proj": Cut(1, Axis.HEADS),
    "gate_proj": Cut(0, Axis.INNER),
    "up_proj": Cut(0, Axis.INNER),
    "down_proj": Cut(1, Axis.INNER),
    "embed_tokens": Cut(0, Axis.VOCAB),
    "lm_head": Cut(0, Axis.VOCAB),
}


class Buffers(NamedTuple):
    """A step's activations; every layer writes over the last one's."""

    hidden: torch.Tensor  # [rows, hidden_size] float32
    normed: torch.Tensor  # [rows, hidden_size] act
    qkv: torch.Tensor  # [rows, (num_heads + 2 * num_kv_heads) * head_dim] Ops.qkv_dtype
    query: torch.Tensor  # [rows, num_heads * head_dim] act
    attended: torch.Tensor  # [rows, num_heads * head_dim] act
    gated: torch.Tensor  # [rows, intermediate_size] act
    logits: torch.Tensor  # [rows, Stage.num_logits] float32


def workspace(config: ModelConfig, ops: Ops, num_logits: int) -> Workspace[Buffers]:
    heads = config.num_heads * config.head_dim
    act, f32 = ops.act_dtype, torch.float32
    columns = [
        (config.hidden_size, f32),
        (config.hidden_size, act),
        (heads + 2 * config.num_kv_heads * config.head_dim, ops.qkv_dtype),
        (heads, act),
        (heads, act),
        (config.intermediate_size, act),
        (num_logits, f32),
    ]
    return Workspace(Buffers, columns, ops.device)


class MlpBuffers(Protocol):
    """What the MLP of any family works on, as in `Buffers`."""

    @property
    def hidden(self) -> torch.Tensor: ...

    @property
    def normed(self) -> torch.Tensor: ...

    @property
    def gated(self) -> torch.Tensor: ...


class Mlp:
    """The MLP of one layer, which every row passes."""

    def __init__(
        self, config: ModelConfig, index: int, weights: Weights, ops: Ops, next_norm: torch.Tensor
    ) -> None:
        def get(name: str) -> Weight:
            return weights(f"model.layers.{index}.mlp.{name}_proj.weight")

        self.gated = ops.gated(get("gate"), get("up"))
        self.down = ops.linear_add_norm(get("down"), next_norm, config.norm_eps)

    def __call__(self, work: MlpBuffers) -> None:
        """hidden += mlp(normed); normed = next_norm(hidden)"""
        self.gated(work.normed, work.gated)
        self.down(work.gated, work.hidden, work.normed)


# What ends a layer: made as Mlp is, for the families that have something else there.
MakeMlp = Callable[[ModelConfig, int, Weights, Ops, torch.Tensor], Callable[[MlpBuffers], None]]


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


def build(
    config: ModelConfig,
    weights: Weights,
    ops: Ops,
    progress: Progress,
    stage: Stage,
    make_mlp: MakeMlp = Mlp,
) -> Decoder[Buffers]:
    """Bind the weights of `stage` to `ops`."""
    tables = rotary.tables(config)

    def layer(index: int, next_norm: torch.Tensor) -> Layer:
        return Layer(config, index, weights, ops, tables, next_norm, make_mlp)

    spaces = workspace(config, ops, num_logits=0), workspace(config, ops, stage.num_logits)
    return assemble(config, weights, ops, progress, stage, layer, *spaces)


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
