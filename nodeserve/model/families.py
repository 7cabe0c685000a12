"""Which code computes which architecture: one line for each, and the ways into it.

`nodeserve.config_readers` has the other half, what is read of a model without torch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from nodeserve.config import ModelConfig
from nodeserve.errors import ModelError
from nodeserve.model import deepseek, foreign, llama, moe, opt
from nodeserve.model.decoder import Progress, Stage, Weights
from nodeserve.model.inputs import StepInputs
from nodeserve.model.ops import Ops
from nodeserve.shards import Cuts


class Model(Protocol):
    """A decoder, or one worker's part of it, with its weights bound to operations."""

    config: ModelConfig
    stage: Stage

    def reserve(
        self, max_tokens: int, max_logit_rows: int, max_seqs: int, max_context_len: int
    ) -> None:
        """Memory for steps up to these sizes; a larger one is refused from now on."""

    def forward(self, inputs: StepInputs, cache: Any) -> torch.Tensor:
        """Logits [num_logits, vocab_size] float32, in a buffer that the next call overwrites."""

    # What forward does, in two halves: for pipelines (see decoder.py).

    def advance(self, inputs: StepInputs, cache: Any) -> None:
        """This stage's layers."""

    def logits(self, num_rows: int) -> torch.Tensor:
        """On the first stage, of the step that advanced first of those not yet asked for."""


class Family(NamedTuple):
    """What a family's file gives."""

    build: Callable[[ModelConfig, Weights, Ops, Progress, Stage], Model]
    # The shape of the tensor that the hub calls so; None if such a model has none.
    shape_of: Callable[[ModelConfig, str], tuple[int, ...] | None]
    cuts: Cuts  # which tensors tensor ranks share, and how


_LLAMA = Family(llama.build, llama.shape_of, llama.CUTS)
_MOE = Family(moe.build, moe.shape_of, moe.CUTS)
_DEEPSEEK = Family(deepseek.build, deepseek.shape_of, deepseek.CUTS)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mixtral": _MOE,
    "qwen2_moe": _MOE,
    "qwen3_moe": _MOE,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "opt": Family(opt.build, opt.shape_of, opt.CUTS),
    "transformers": Family(foreign.build, foreign.shape_of, {}),
}


def build(
    config: ModelConfig,
    weights: Weights,
    ops: Ops,
    progress: Progress | None = None,
    stage: Stage | None = None,
) -> Model:
    """Bind the weights to `ops`. A tensor is asked for once and may be dropped after the call.

    Of one worker among several, config, weights and ops are what parallel.py makes of them.
    """
    family = _family(config)
    with torch.inference_mode():
        return family.build(
            config, weights, ops, progress or _no_progress, stage or Stage.whole(config)
        )


def shape_of(config: ModelConfig, name: str) -> tuple[int, ...] | None:
    """The shape of the tensor that the hub calls `name`; None if the model has none."""
    return _family(config).shape_of(config, name)


def cuts_of(config: ModelConfig) -> Cuts:
    """Which tensors tensor ranks share, by the last part of their names."""
    return _family(config).cuts


def _family(config: ModelConfig) -> Family:
    if config.architecture not in FAMILIES:
        raise ModelError(
            f"architecture {config.architecture!r} is not supported; supported: "
            + ", ".join(FAMILIES)
        )
    return FAMILIES[config.architecture]


def _no_progress(done: int, total: int) -> None:
    pass
