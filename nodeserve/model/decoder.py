"""A stack of layers between an embedding and a head: what all families of decoders share.

A family brings the parts (`Parts`); this runs them, on one worker or on a pipeline of stages. The
first stage has embedding and head, because tokens are chosen where its leader is: a row of `hidden`
is some thirty times smaller than its logits, so the last stage sends back normed rows.

    first stage   embed, its layers              hidden of all rows go to the next stage
    last stage    its layers, the model's norm   normed rows whose logits are wanted go to the first
    first stage   head

A step on its way through the stages is a micro-batch; several may be under way. Every stage takes
them in one order, in `advance` as in `logits`, and a send never waits for its receiver, so they
cannot wait for each other in a circle.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from nodeserve.config import ModelConfig
from nodeserve.model.group import Pipe
from nodeserve.model.inputs import StepInputs
from nodeserve.model.ops import Op, Ops
from nodeserve.model.quantised import Weight, dense
from nodeserve.model.workspace import Workspace

Weights = Callable[[str], Weight]  # by hub name, e.g. "model.layers.0.mlp.up_proj.weight"
Progress = Callable[[int, int], None]  # parts done, parts in all


class Activations(Protocol):
    """What every family's buffers have; each row is a token."""

    @property
    def hidden(self) -> torch.Tensor: ...  # [rows, hidden_size] float32, the residual stream

    @property
    def normed(self) -> torch.Tensor: ...  # [rows, hidden_size] act

    @property
    def attended(self) -> torch.Tensor: ...  # [rows, ...] act, what attention gave

    @property
    def logits(self) -> torch.Tensor: ...  # [rows, Stage.num_logits] float32


B = TypeVar("B", bound=Activations)
C = TypeVar("C", bound=Activations, contravariant=True)


class Layer(Protocol[C]):
    """One layer, in two halves: what needs every row, and what a row does alone."""

    def attend(self, work: C, step: Any) -> None:
        """From `normed` to `attended`; keys and values go to their pages."""

    def finish(self, work: C) -> None:
        """From `attended` into `hidden`, and `normed` with the norm that comes next."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The part of a decoder that a worker has."""

    layers: range  # numbers of its layers in the whole model
    num_layers: int  # of the whole model
    num_logits: int  # columns of the logits that it gives: the vocabulary at the leader, else 0
    pipe: Pipe | None = None  # None: there is one stage
    lockstep: bool = False  # other ranks wait in every layer, whether we have rows or not

    @staticmethod
    def whole(config: ModelConfig) -> "Stage":
        return Stage(range(config.num_layers), config.num_layers, config.vocab_size)

    @property
    def is_first(self) -> bool:
        return self.layers.start == 0

    @property
    def is_last(self) -> bool:
        return self.layers.stop == self.num_layers


@dataclass(frozen=True, slots=True)
class Parts(Generic[B]):
    """What a family gives, bound to weights; the ends are there on the first stage only."""

    work: Workspace[B]  # for all rows of a step
    tail: Workspace[B]  # for the rows whose logits are wanted
    embed: Callable[[StepInputs, B], None] | None  # writes `hidden`
    first_norm: Op  # the input norm of our first layer
    layers: Sequence[Layer[B]]
    head: Op | None  # normed rows -> logits


class Decoder(Generic[B]):
    """A decoder, or one stage of it, with its weights bound to operations."""

    def __init__(self, config: ModelConfig, ops: Ops, stage: Stage, parts: Parts[B]) -> None:
        self.config = config
        self.stage = stage
        self._ops = ops
        self._parts = parts

    def reserve(
        self, max_tokens: int, max_logit_rows: int, max_seqs: int, max_context_len: int
    ) -> None:
        """Memory for steps up to these sizes; a larger one is refused from now on."""
        self._parts.work.reserve(max_tokens)
        self._parts.tail.reserve(max_logit_rows)
        self._ops.reserve(max_tokens, max_seqs, max_context_len)

    def forward(self, inputs: StepInputs, cache: Any) -> torch.Tensor:
        """Logits [num_logits, vocab_size] float32, in a buffer that the next call overwrites.

        Without columns on every worker but the leader. With several stages, call the two halves.
        """
        self.advance(inputs, cache)
        return self.logits(inputs.logit_rows.numel())

    @torch.inference_mode()
    def advance(self, inputs: StepInputs, cache: Any) -> None:
        """This stage's layers of one micro-batch, which may be empty."""
        stage, parts = self.stage, self._parts
        if not inputs.token_ids.numel():
            self._advance_nothing()
            return
        step = self._ops.begin(inputs, cache)
        work = parts.work.rows(inputs.token_ids.numel())
        if parts.embed is not None:
            parts.embed(inputs, work)
        else:
            assert stage.pipe is not None
            stage.pipe.receive(work.hidden)
        parts.first_norm(work.hidden, work.normed)
        for layer in parts.layers[:-1]:
            layer.attend(work, step)
            layer.finish(work)
        parts.layers[-1].attend(work, step)
        if stage.is_last:
            self._finish_wanted(work, inputs.logit_rows)
        else:
            assert stage.pipe is not None
            parts.layers[-1].finish(work)
            stage.pipe.send(work.hidden)

    def _advance_nothing(self) -> None:
        """Where ranks share experts, the others' rows may need ours."""
        if self.stage.lockstep:
            work = self._parts.work.rows(0)
            for layer in self._parts.layers:
                layer.finish(work)

    def _finish_wanted(self, work: B, rows: torch.Tensor) -> None:
        """The last layer's second half and the model's norm, only where logits are wanted."""
        tail = self._parts.tail.rows(rows.numel())
        if not rows.numel() and not self.stage.lockstep:
            return
        torch.index_select(work.hidden, 0, rows, out=tail.hidden)
        torch.index_select(work.attended, 0, rows, out=tail.attended)
        self._parts.layers[-1].finish(tail)
        if self.stage.pipe is not None:
            self.stage.pipe.send_back(tail.normed)

    @torch.inference_mode()
    def logits(self, num_rows: int) -> torch.Tensor:
        """Of the micro-batch that advanced first of those that have not been asked for yet.

        `num_rows` is the number of its `logit_rows`. Of the first stage, every worker must call it.
        """
        tail = self._parts.tail.rows(num_rows)
        if self._parts.head is None or num_rows == 0:
            return tail.logits
        if self.stage.pipe is not None:
            self.stage.pipe.receive_back(tail.normed)
        self._parts.head(tail.normed, tail.logits)
        return tail.logits


Ends = tuple[Callable[[StepInputs, Any], None], Op]


def word_ends(
    config: ModelConfig, weights: Weights, ops: Ops, stage: Stage
) -> Ends | tuple[None, None]:
    """Embedding and head as most families have them, on the stage that has them."""
    if not stage.is_first:
        return None, None
    table = weights("model.embed_tokens.weight")
    embedding = ops.embedding(table)
    head = ops.head(table if config.tie_embeddings else weights("lm_head.weight"))

    def embed(inputs: StepInputs, work: Activations) -> None:
        embedding(inputs.token_ids, work.hidden)

    return embed, head


def norm_names(stage: Stage) -> list[str]:
    """The input norms of a stage's layers, and the norm behind its last one, in most families."""
    names = [f"model.layers.{index}.input_layernorm.weight" for index in stage.layers]
    behind = stage.layers.stop
    last = "model.norm" if stage.is_last else f"model.layers.{behind}.input_layernorm"
    return [*names, f"{last}.weight"]


def assemble(
    config: ModelConfig,
    weights: Weights,
    ops: Ops,
    progress: Progress,
    stage: Stage,
    make_layer: Callable[[int, torch.Tensor], Layer[B]],
    work: Workspace[B],
    tail: Workspace[B],
) -> Decoder[B]:
    """A decoder of the usual names and RMS norms. `make_layer` gets a number and the next norm."""
    total = len(stage.layers) + 1
    embed, head = word_ends(config, weights, ops, stage)
    first_norm, *norms = (dense(weights(name)) for name in norm_names(stage))
    progress(1, total)
    layers = []
    for done, (index, next_norm) in enumerate(zip(stage.layers, norms, strict=True), 2):
        layers.append(make_layer(index, next_norm))
        progress(done, total)
    norm = ops.rms_norm(first_norm, config.norm_eps)
    return Decoder(config, ops, stage, Parts(work, tail, embed, norm, layers, head))
