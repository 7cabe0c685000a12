"""Holds answers to their constraints: what may not come next is never the choice.

A sequence's follower has consumed exactly the tokens that were put out before the choice, whoever
chose them: after a preemption, a handoff or a worker's end it is made again from those.
"""

import contextlib
import threading
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from nodeserve.config import ModelConfig, WorkerSpec
from nodeserve.errors import InvalidRequest, NodeServeError
from nodeserve.policy.batching import Sequence
from nodeserve.text.constraints import Compiler, Matcher
from nodeserve.worker.contract import Failure
from nodeserve.worker.penalties import Choice, sent

NEVER = (
    3e38  # what a forbidden token's logit loses: all but an infinity, which times 0 is no number
)


class Follower:
    """A matcher, and how many of its sequence's tokens it has seen."""

    __slots__ = ("matcher", "num_seen")

    def __init__(self, matcher: Matcher, num_seen: int) -> None:
        self.matcher = matcher
        self.num_seen = num_seen

    def allowed(self, sequence: Sequence) -> bytes:
        """What may come next, a bit for each token; InvalidRequest if it cannot be said."""
        matcher = self.matcher
        if new := sequence.token_ids[self.num_seen :]:
            matcher.consume(new)
            self.num_seen += len(new)
        bits = matcher.allowed()
        if problem := matcher.problem:
            raise InvalidRequest(
                f"constraint cannot be followed after {sequence.num_output} tokens: {problem}"
            )
        return bits


class Constraints:
    """Those of one worker's sequences. `load` is called when the first one needs it, or before by
    `load_ahead`."""

    def __init__(self, load: Callable[[], Compiler]) -> None:
        self._load = load
        self._compiler: Compiler | None = None
        self._loading: threading.Thread | None = None

    @classmethod
    def of_worker(cls, spec: WorkerSpec, config: ModelConfig) -> "Constraints | None":
        """With the tokenizer of its checkpoint, whose loading begins beside the caller's own work:
        a vocabulary takes a third of a second, for which a step would stand still. None: a follower
        chooses no token."""
        if not spec.leads:
            return None
        made = cls(partial(Compiler.load, spec.model, config.vocab_size, config.eos_token_ids))
        made.load_ahead()
        return made

    def load_ahead(self) -> None:
        """Begin to load, in a thread. What it fails with is for the first sequence to say."""

        def load() -> None:
            with contextlib.suppress(NodeServeError):
                self._compiler = self._load()

        self._loading = threading.Thread(target=load, name="vocabulary", daemon=True)
        self._loading.start()

    def follower(self, sequence: Sequence) -> Follower:
        """At the beginning of the sequence's output. A typed error says why there is none."""
        if self._loading is not None:
            self._loading.join()
            self._loading = None
        if self._compiler is None:
            self._compiler = self._load()
        assert sequence.sampling.constraint is not None
        matcher = self._compiler.matcher(sequence.sampling.constraint)
        return Follower(matcher, sequence.num_prompt_tokens)


def constrain(
    constraints: Constraints | None,
    logits: torch.Tensor,
    sequences: list[Sequence],
    choices: list[Choice],
) -> tuple[Failure, ...]:
    """In place. logits [num_seqs, vocab_size] float32; those that cannot go on keep theirs."""
    constrained = [row for row, choice in enumerate(choices) if choice.constrained]
    if not constrained:
        return ()
    assert constraints is not None, "a device without them"
    rows: list[int] = []
    masks: list[bytes] = []
    failed: list[Failure] = []
    for row in constrained:
        sequence, choice = sequences[row], choices[row]
        try:
            if choice.follower is None:
                choice.follower = constraints.follower(sequence)
            masks.append(choice.follower.allowed(sequence))
            rows.append(row)
        except NodeServeError as problem:
            failed.append(Failure(row, problem))
    if rows:
        forbid(logits, rows, b"".join(masks))
    return tuple(failed)


def forbid(logits: torch.Tensor, rows: list[int], allowed: bytes) -> None:
    """Take NEVER from each token of these rows whose bit is not set in `allowed`, which has as many
    bytes for each row. What is allowed keeps its logit, to the bit. A sum and no choice: that takes
    twice as long, and ten times where the next flag cannot be guessed."""
    device = logits.device
    forbidden = ~np.frombuffer(allowed, dtype=np.uint8)
    if device.type == "cpu":
        flags = torch.from_numpy(np.unpackbits(forbidden, bitorder="little"))
    else:  # the bits travel
        flags = unpacked(sent(torch.from_numpy(forbidden), device))
    wide = flags.view(len(rows), -1)[:, : logits.size(1)]
    logits.index_add_(0, sent(torch.tensor(rows), device), wide.float(), alpha=-NEVER)


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """The bits of bytes, the lowest first, as many bytes."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return packed.unsqueeze(-1).bitwise_right_shift(places).bitwise_and_(1).flatten()
