"""OPT: learned positions, LayerNorm, ReLU and biases; the 350m size norms after its half layers.

    hidden = embed(token_ids) [project_in] + positions;   normed = norm(hidden)
    per layer:  hidden += out_proj(attention(qkv(normed)));     normed = norm(hidden)
                hidden += fc2(relu(fc1(normed)));               normed = norm(hidden)
    logits = head([project_out](normed))

Where norms come after (`OptConfig.norm_first` is false), a norm's result is the residual stream
itself: hidden = norm(hidden), and `normed` is a copy of it. Shapes are as in llama.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from nodeserve.config import ModelConfig, OptConfig
from nodeserve.model.decoder import Decoder, Parts, Progress, Stage, Weights
from nodeserve.model.inputs import StepInputs
from nodeserve.model.llama import part_of_layer
from nodeserve.model.ops import Op, Ops
from nodeserve.model.quantised import Weight, dense, stacked
from nodeserve.model.workspace import Workspace
from nodeserve.shards import Axis, Cut

CUTS = {
    "q_proj": Cut(0, Axis.HEADS),
    "k_proj": Cut(0, Axis.HEADS),
    "v_proj": Cut(0, Axis.HEADS),
    "out_proj": Cut(1, Axis.HEADS),
    "fc1": Cut(0, Axis.INNER),
    "fc2": Cut(1, Axis.INNER),
    "embed_tokens": Cut(0, Axis.VOCAB),
    "lm_head": Cut(0, Axis.VOCAB),
}
POSITION_OFFSET = 2  # rows of the table before position 0: for padding, which there is none of

_DECODER = "model.decoder."
_LAYER = "model.decoder.layers."


class Buffers(NamedTuple):
    """A step's activations; every layer writes over the last one's."""

    hidden: torch.Tensor  # [rows, hidden_size] float32
    normed: torch.Tensor  # [rows, hidden_size] act
    qkv: torch.Tensor  # [rows, 3 * num_heads * head_dim] Ops.qkv_dtype
    query: torch.Tensor  # [rows, num_heads * head_dim] act
    attended: torch.Tensor  # [rows, num_heads * head_dim] act
    inner: torch.Tensor  # [rows, intermediate_size] act
    logits: torch.Tensor  # [rows, Stage.num_logits] float32


def workspace(config: ModelConfig, ops: Ops, num_logits: int) -> Workspace[Buffers]:
    heads = config.num_heads * config.head_dim
    act, f32 = ops.act_dtype, torch.float32
    columns = [
        (config.hidden_size, f32),
        (config.hidden_size, act),
        (3 * heads, ops.qkv_dtype),
        (heads, act),
        (heads, act),
        (config.intermediate_size, act),
        (num_logits, f32),
    ]
    return Workspace(Buffers, columns, ops.device)


class Norm:
    """Between half layers: from `hidden` to `normed`, in the way of this size of OPT."""

    def __init__(self, norm: Op | None, in_place: bool) -> None:
        self._norm = norm
        self._in_place = in_place

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        if self._norm is not None and not self._in_place:
            self._norm(x, out)
            return
        if self._norm is not None:
            self._norm(x, x)
        out.copy_(x)


class Layer:
    """One decoder layer, in two halves: what needs every row, and what a row does alone."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        weights: Weights,
        ops: Ops,
        tables: tuple[torch.Tensor, torch.Tensor],
        norms: tuple[Norm, Norm],  # in the middle and at the end
    ) -> None:
        opt, prefix = _opt(config), f"{_LAYER}{index}."

        def bias(name: str) -> torch.Tensor | None:
            return dense(weights(f"{prefix}{name}.bias")) if opt.biased else None

        def qkv(kind: str) -> Weight:
            return stacked([weights(f"{prefix}self_attn.{name}_proj.{kind}") for name in "qkv"])

        self.qkv = ops.linear(qkv("weight"), dense(qkv("bias")) if opt.biased else None)
        self.attention = ops.attention(config, index, tables, None)
        self.out_proj = ops.linear_add(
            weights(f"{prefix}self_attn.out_proj.weight"), bias("self_attn.out_proj")
        )
        self.fc1 = ops.linear_relu(weights(f"{prefix}fc1.weight"), bias("fc1"))
        self.fc2 = ops.linear_add(weights(f"{prefix}fc2.weight"), bias("fc2"))
        self.middle_norm, self.last_norm = norms

    def attend(self, work: Buffers, step: Any) -> None:
        self.qkv(work.normed, work.qkv)
        self.attention.store(step, work.qkv, work.query)
        self.attention.attend(step, work.query, work.attended)

    def finish(self, work: Buffers) -> None:
        self.out_proj(work.attended, work.hidden)
        self.middle_norm(work.hidden, work.normed)
        self.fc1(work.normed, work.inner)
        self.fc2(work.inner, work.hidden)
        self.last_norm(work.hidden, work.normed)


def build(
    config: ModelConfig, weights: Weights, ops: Ops, progress: Progress, stage: Stage
) -> Decoder[Buffers]:
    """Bind the weights of `stage` to `ops`."""
    total = len(stage.layers) + 1
    embed, head = _ends(config, weights, ops) if stage.is_first else (None, None)
    progress(1, total)
    first_norm, norms = _norms(config, weights, ops, stage)
    tables = _no_rotation(config)
    layers = []
    for place, index in enumerate(stage.layers):
        layers.append(Layer(config, index, weights, ops, tables, norms[place]))
        progress(place + 2, total)
    parts = Parts(
        work=workspace(config, ops, num_logits=0),
        tail=workspace(config, ops, stage.num_logits),
        embed=embed,
        first_norm=first_norm,
        layers=layers,
        head=head,
    )
    return Decoder(config, ops, stage, parts)


def _norms(
    config: ModelConfig, weights: Weights, ops: Ops, stage: Stage
) -> tuple[Norm, list[tuple[Norm, Norm]]]:
    """What comes before the stage's layers, and in the middle and at the end of each."""
    opt = _opt(config)

    def norm(name: str) -> Norm:
        scale, offset = (dense(weights(f"{_DECODER}{name}.{kind}")) for kind in ("weight", "bias"))
        return Norm(ops.layer_norm(scale, offset, config.norm_eps), not opt.norm_first)

    def pair(index: int) -> tuple[Norm, Norm]:
        return norm(f"layers.{index}.self_attn_layer_norm"), norm(
            f"layers.{index}.final_layer_norm"
        )

    copy = Norm(None, in_place=False)
    if not opt.norm_first:  # a layer's two norms are its own
        return copy, [pair(index) for index in stage.layers]
    before, middle = zip(*(pair(index) for index in stage.layers), strict=True)
    if not stage.is_last:
        behind = norm(f"layers.{stage.layers.stop}.self_attn_layer_norm")
    else:
        behind = norm("final_layer_norm") if opt.final_norm else copy
    return before[0], list(zip(middle, [*before[1:], behind], strict=True))


def _ends(
    config: ModelConfig, weights: Weights, ops: Ops
) -> tuple[Callable[[StepInputs, Buffers], None], Op]:
    """Embedding and head, with what lies between their columns and ours."""
    table = weights(f"{_DECODER}embed_tokens.weight")
    words = ops.embedding(table)
    head = ops.head(table if config.tie_embeddings else weights("lm_head.weight"))
    rows = dense(weights(f"{_DECODER}embed_positions.weight"))[POSITION_OFFSET:]
    positions = ops.add_positions(rows)
    width = _opt(config).embedding_size
    if width != config.hidden_size:
        words = _through(words, ops.linear(weights(f"{_DECODER}project_in.weight")), width, ops)
        out = ops.linear(weights(f"{_DECODER}project_out.weight"))
        head = _through(out, head, width, ops)

    def embed(inputs: StepInputs, work: Buffers) -> None:
        words(inputs.token_ids, work.hidden)
        positions(inputs.positions, work.hidden)

    return embed, head


def _through(first: Op, second: Op, width: int, ops: Ops) -> Op:
    """`second` of `first`, which writes `width` columns of float32."""

    def op(x: torch.Tensor, out: torch.Tensor) -> None:
        between = torch.empty(x.size(0), width, dtype=torch.float32, device=ops.device)
        first(x, between)
        second(between.to(ops.act_dtype), out)

    return op


def _no_rotation(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [max_position, head_dim / 2] that leave q and k as they are."""
    shape = (config.max_position, config.head_dim // 2)
    return torch.ones(shape), torch.zeros(shape)


def _opt(config: ModelConfig) -> OptConfig:
    assert config.opt is not None, f"{config.architecture} is not OPT"
    return config.opt


def shape_of(config: ModelConfig, name: str) -> tuple[int, ...] | None:
    """The shape of the tensor that the hub calls `name`; None if the model has none."""
    opt, hidden, inner = _opt(config), config.hidden_size, config.intermediate_size
    width = opt.embedding_size
    whole: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config.vocab_size, width),
        "embed_positions.weight": (config.max_position + POSITION_OFFSET, hidden),
    }
    if opt.final_norm:
        whole |= {"final_layer_norm.weight": (hidden,), "final_layer_norm.bias": (hidden,)}
    if width != hidden:
        whole |= {"project_in.weight": (hidden, width), "project_out.weight": (width, hidden)}
    if name == "lm_head.weight" and not config.tie_embeddings:
        return config.vocab_size, width
    if name.startswith(_DECODER) and name.removeprefix(_DECODER) in whole:
        return whole[name.removeprefix(_DECODER)]
    part = part_of_layer(config, name, _LAYER)
    owner, _, kind = part.rpartition(".")
    if owner in ("self_attn_layer_norm", "final_layer_norm"):
        return (hidden,) if kind in ("weight", "bias") else None
    linears = {"fc1": (inner, hidden), "fc2": (hidden, inner)}
    linears |= dict.fromkeys((f"self_attn.{one}_proj" for one in "qkv"), (hidden, hidden))
    linears["self_attn.out_proj"] = (hidden, hidden)
    if owner not in linears or (kind == "bias" and not opt.biased):
        return None
    return {"weight": linears[owner], "bias": linears[owner][:1]}.get(kind)
