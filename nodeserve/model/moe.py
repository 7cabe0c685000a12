"""Mixtral, Qwen2-MoE and Qwen3-MoE: the decoder of llama.py, with experts where its MLP was.

normed -> router -> the best experts of each row, computed beside what all rows share
hidden += weighted sum of their results;   normed = next_norm(hidden)
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from nodeserve.config import ModelConfig
from nodeserve.model import llama
from nodeserve.model.decoder import Decoder, Progress, Stage, Weights
from nodeserve.model.expert_parts import Mlp, Router, Shared
from nodeserve.model.llama import MlpBuffers, part_of_layer
from nodeserve.model.ops import Ops
from nodeserve.model.quantised import dense
from nodeserve.shards import Axis, Cut


class Names(NamedTuple):
    """What the hub calls the parts of a sparse layer, after "model.layers.N."."""

    router: str
    experts: str
    mlp: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "mlp.shared_expert"


QWEN = Names("mlp.gate", "mlp.experts")
DEEPSEEK = QWEN._replace(shared="mlp.shared_experts")
NAMES = {
    "mixtral": Names("block_sparse_moe.gate", "block_sparse_moe.experts", ("w1", "w3", "w2")),
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
}
# An expert is cut like an MLP: w1, w3 and w2 are Mixtral's gate, up and down.
CUTS = {
    **llama.CUTS,
    "w1": Cut(0, Axis.INNER),
    "w3": Cut(0, Axis.INNER),
    "w2": Cut(1, Axis.INNER),
}
_SHARED_GATE = "mlp.shared_expert_gate"
_CHOICE_BIAS = "mlp.gate.e_score_correction_bias"


def names_of(config: ModelConfig) -> Names:
    return NAMES.get(config.architecture, QWEN)


class SparseMlp:
    """The experts of one layer and the norm behind them."""

    def __init__(
        self, config: ModelConfig, index: int, weights: Weights, ops: Ops, next_norm: torch.Tensor
    ) -> None:
        assert config.moe is not None, "a dense model"
        names, prefix = names_of(config), f"model.layers.{index}."

        def expert(number: int) -> Mlp:
            return _mlp(weights, f"{prefix}{names.experts}.{number}.", names)

        shared = None
        if config.moe.shared_intermediate_size:
            gate = weights(f"{prefix}{_SHARED_GATE}.weight") if config.moe.shared_gate else None
            shared = Shared(_mlp(weights, f"{prefix}{names.shared}.", names), gate)
        bias = dense(weights(f"{prefix}{_CHOICE_BIAS}")) if config.moe.choice_bias else None
        router = Router(weights(f"{prefix}{names.router}.weight"), bias)
        self.experts = ops.experts(config.moe, index, router, expert, shared)
        self.add_norm = ops.add_norm(next_norm, config.norm_eps)

    def __call__(self, work: MlpBuffers) -> None:
        """hidden += experts(normed); normed = next_norm(hidden)"""
        delta = torch.empty_like(work.hidden)
        self.experts(work.normed, delta)
        self.add_norm(delta, work.hidden, work.normed)


def _mlp(weights: Weights, prefix: str, names: Names) -> Mlp:
    gate, up, down = (weights(f"{prefix}{name}.weight") for name in names.mlp)
    return Mlp(gate, up, down)


def make_mlp(
    config: ModelConfig, index: int, weights: Weights, ops: Ops, next_norm: torch.Tensor
) -> Callable[[MlpBuffers], None]:
    kind = SparseMlp if config.is_sparse(index) else llama.Mlp
    return kind(config, index, weights, ops, next_norm)


def build(
    config: ModelConfig, weights: Weights, ops: Ops, progress: Progress, stage: Stage
) -> Decoder[llama.Buffers]:
    """Bind the weights of `stage` to `ops`."""
    return llama.build(config, weights, ops, progress, stage, make_mlp)


def shape_of(config: ModelConfig, name: str) -> tuple[int, ...] | None:
    """The shape of the tensor that the hub calls `name`; None if the model has none."""
    part = part_of_layer(config, name)
    if part.startswith(("mlp.", "block_sparse_moe.")) and config.is_sparse(layer_of(name)):
        return _sparse_shape(config, part.removesuffix(".weight"))
    return llama.shape_of(config, name)


def layer_of(name: str) -> int:
    """The N of "model.layers.N. ..."."""
    return int(name.split(".", 3)[2])


def _sparse_shape(config: ModelConfig, part: str) -> tuple[int, ...] | None:
    moe, hidden, names = config.moe, config.hidden_size, names_of(config)
    assert moe is not None, "a dense model"
    if part == names.router:
        return moe.num_experts, hidden
    if part == _CHOICE_BIAS and moe.choice_bias:
        return (moe.num_experts,)
    if part == _SHARED_GATE and moe.shared_gate:
        return 1, hidden
    owner, _, matrix = part.rpartition(".")
    experts, _, number = owner.rpartition(".")
    inner = 0
    if owner == names.shared:
        inner = moe.shared_intermediate_size
    elif experts == names.experts and number.isdecimal() and int(number) < moe.num_experts:
        inner = moe.intermediate_size
    if not inner or matrix not in names.mlp:
        return None
    return (hidden, inner) if matrix == names.mlp[2] else (inner, hidden)
