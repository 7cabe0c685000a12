"""DeepSeek-V2 (Lite too), V3 and R1: latent attention, then a dense MLP or routed experts.

    hidden = embed(token_ids);  normed = norm(hidden)
    per layer:  heads = q(normed), or q_b(norm(q_a(normed)));  latent = kv_a(normed)
                hidden += out_proj(mla(heads, latent));         normed = norm(hidden)
                hidden += mlp(normed);                          normed = norm(hidden)
    logits = head(normed)

The first layers have the MLP of a Llama, the others experts: some for every token, others by a
router's choice. Pages hold latents (see ops.MlaAttention), half layers end with the norm that comes
next, and shapes and rules are llama.py's. Layers behind `num_layers` in a checkpoint predict more
than one token; they are never asked for.
"""

from typing import Any, NamedTuple

import torch

from nodeserve.config import ModelConfig
from nodeserve.model import moe, rotary
from nodeserve.model.decoder import Decoder, Progress, Stage, Weights, assemble
from nodeserve.model.llama import part_of_layer
from nodeserve.model.mla_torch import mla_of
from nodeserve.model.ops import Ops
from nodeserve.model.quantised import Weight, dense
from nodeserve.model.workspace import Workspace
from nodeserve.shards import Axis, Cut

# Heads have several sizes here; the latents that all heads share are whole on every rank.
CUTS = {
    **moe.CUTS,
    "q_b_proj": Cut(0, Axis.HEADS),
    "kv_b_proj": Cut(0, Axis.HEADS),
}


class Buffers(NamedTuple):
    """A step's activations; every layer writes over the last one's."""

    hidden: torch.Tensor  # [rows, hidden_size] float32
    normed: torch.Tensor  # [rows, hidden_size] act
    low: torch.Tensor  # [rows, q_lora_rank] float32; no columns where queries have no rank
    low_normed: torch.Tensor  # the same in act
    heads: torch.Tensor  # [rows, num_heads * head_dim] Ops.qkv_dtype
    latent: torch.Tensor  # [rows, latent_dim] Ops.qkv_dtype
    query: torch.Tensor  # [rows, num_heads * latent_dim] act
    attended: torch.Tensor  # [rows, num_heads * v_head_dim] act
    gated: torch.Tensor  # [rows, intermediate_size] act
    logits: torch.Tensor  # [rows, Stage.num_logits] float32


def workspace(config: ModelConfig, ops: Ops, num_logits: int) -> Workspace[Buffers]:
    mla = mla_of(config)
    act, f32 = ops.act_dtype, torch.float32
    columns = [
        (config.hidden_size, f32),
        (config.hidden_size, act),
        (mla.q_lora_rank or 0, f32),
        (mla.q_lora_rank or 0, act),
        (config.num_heads * config.head_dim, ops.qkv_dtype),
        (mla.latent_dim, ops.qkv_dtype),
        (config.num_heads * mla.latent_dim, act),
        (config.num_heads * mla.v_head_dim, act),
        (config.intermediate_size, act),
        (num_logits, f32),
    ]
    return Workspace(Buffers, columns, ops.device)


class Queries:
    """What a layer asks of its tokens: one product, or two with a norm between them."""

    def __init__(self, config: ModelConfig, get: Weights, ops: Ops) -> None:
        mla = mla_of(config)
        self._ranked = mla.q_lora_rank is not None
        if not self._ranked:
            self._whole = ops.linear(get("q_proj.weight"))
            return
        self._down = ops.linear(get("q_a_proj.weight"))
        self._norm = ops.rms_norm(dense(get("q_a_layernorm.weight")), mla.norm_eps)
        self._up = ops.linear(get("q_b_proj.weight"))

    def __call__(self, work: Buffers) -> None:
        if not self._ranked:
            self._whole(work.normed, work.heads)
            return
        self._down(work.normed, work.low)
        self._norm(work.low, work.low_normed)
        self._up(work.low_normed, work.heads)


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
    ) -> None:
        def get(name: str) -> Weight:
            return weights(f"model.layers.{index}.{name}")

        def of_attention(name: str) -> Weight:
            return get(f"self_attn.{name}")

        self.queries = Queries(config, of_attention, ops)
        self.latent = ops.linear(of_attention("kv_a_proj_with_mqa.weight"))
        kv_norm = dense(of_attention("kv_a_layernorm.weight"))
        kv_up = of_attention("kv_b_proj.weight")
        self.attention = ops.mla_attention(config, index, tables, kv_norm, kv_up)
        middle_norm = dense(get("post_attention_layernorm.weight"))
        self.out_proj = ops.linear_add_norm(
            of_attention("o_proj.weight"), middle_norm, config.norm_eps
        )
        self.mlp = moe.make_mlp(config, index, weights, ops, next_norm)

    def attend(self, work: Buffers, step: Any) -> None:
        self.queries(work)
        self.latent(work.normed, work.latent)
        self.attention.store(step, work.heads, work.latent, work.query)
        self.attention.attend(step, work.query, work.attended)

    def finish(self, work: Buffers) -> None:
        self.out_proj(work.attended, work.hidden, work.normed)
        self.mlp(work)


def build(
    config: ModelConfig, weights: Weights, ops: Ops, progress: Progress, stage: Stage
) -> Decoder[Buffers]:
    """Bind the weights of `stage` to `ops`."""
    tables = rotary.tables(config)

    def layer(index: int, next_norm: torch.Tensor) -> Layer:
        return Layer(config, index, weights, ops, tables, next_norm)

    spaces = workspace(config, ops, num_logits=0), workspace(config, ops, stage.num_logits)
    return assemble(config, weights, ops, progress, stage, layer, *spaces)


def shape_of(config: ModelConfig, name: str) -> tuple[int, ...] | None:
    """The shape of the tensor that the hub calls `name`; None if the model has none."""
    hidden = config.hidden_size
    part = part_of_layer(config, name)
    if not part.startswith("self_attn."):
        return moe.shape_of(config, name)
    mla = mla_of(config)
    heads = config.num_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "kv_a_proj_with_mqa.weight": (mla.latent_dim, hidden),
        "kv_a_layernorm.weight": (mla.kv_lora_rank,),
        "kv_b_proj.weight": (
            config.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim),
            mla.kv_lora_rank,
        ),
        "o_proj.weight": (hidden, config.num_heads * mla.v_head_dim),
    }
    if (rank := mla.q_lora_rank) is None:
        layer["q_proj.weight"] = (heads, hidden)
    else:
        layer["q_a_proj.weight"] = (rank, hidden)
        layer["q_a_layernorm.weight"] = (rank,)
        layer["q_b_proj.weight"] = (heads, rank)
    return layer.get(part.removeprefix("self_attn."))
