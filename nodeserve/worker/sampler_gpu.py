"""Chooses tokens on the device: the rules of `sampler.py`, without the host ever waiting.

`launch` queues everything on torch's current stream and returns; the tokens stay where the next
step takes them from, and a copy goes to pinned memory. Whoever wants to read that copy waits for
the stream first, with an event of their own.
"""

from dataclasses import dataclass

import torch

from nodeserve.model.gpu import sampling
from nodeserve.policy.batching import Sequence
from nodeserve.worker.constraints import Constraints, constrain
from nodeserve.worker.contract import Failure, Sampled
from nodeserve.worker.penalties import Choice, sent, shape_logits
from nodeserve.worker.sampler import choice_of, ranked, told, uniform


@dataclass(frozen=True, slots=True)
class Asked:
    """Logprobs on their way to the host, of the rows that asked."""

    rows: list[int]
    counts: list[int]  # most likely tokens that each wants
    own: torch.Tensor  # [num_asking] float32
    values: torch.Tensor  # [num_asking, most] float32
    ids: torch.Tensor  # [num_asking, most] int64


@dataclass(frozen=True, slots=True)
class Launched:
    """A choice that is queued. `tokens` may be used at once by work on the same stream."""

    tokens: torch.Tensor  # [num_seqs] int32 on the device, until the next launch
    copied: torch.Tensor  # [num_seqs] int32, pinned where the device is a GPU
    asked: Asked | None
    failed: tuple[Failure, ...] = ()

    def result(self) -> Sampled:
        """To be called when the stream has passed the launch: nothing here waits for it."""
        asked = self.asked
        logprobs = None
        if asked is not None:
            logprobs = told(asked.rows, asked.counts, asked.own, asked.values, asked.ids)
        return Sampled(self.copied.tolist(), logprobs, failed=self.failed)


class GpuSampler:
    """The sampler of one worker. `tokens` has one address for good, so a graph may read it."""

    def __init__(
        self, device: torch.device, max_num_seqs: int, constraints: Constraints | None = None
    ) -> None:
        """`constraints`: None if no sequence has one."""
        self.tokens = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self._device = device
        self._constraints = constraints

    @torch.inference_mode()
    def launch(
        self, logits: torch.Tensor, sequences: list[Sequence], places: list[int] | None = None
    ) -> Launched:
        """logits [num_seqs, vocab_size] float32 on the device, which this may write over.

        places: how many tokens each sequence has put out before this one, where its own list is
        behind because the last step's tokens are not on the host yet. A sequence with a penalty
        or a constraint (`Sampling.needs_tokens`) must have them all. Masks are worked out here,
        while the device is busy with the pass that `logits` are to come from.
        """
        tokens = self.tokens[: len(sequences)]
        choices = [choice_of(sequence) for sequence in sequences]
        if all(choice.plain for choice in choices):
            sampling.choose(logits, None, tokens)
            return Launched(tokens, self._to_host(tokens), None)
        if places is None:
            places = [sequence.num_output for sequence in sequences]
        asking = [row for row, one in enumerate(sequences) if one.sampling.logprobs is not None]
        raw = self._raw_logprobs(logits, asking)
        shape_logits(logits, sequences, choices, places)
        failed = constrain(self._constraints, logits, sequences, choices)
        sampling.choose(logits, self._parameters(sequences, choices, places), tokens)
        asked = self._ask(raw, asking, sequences, tokens)
        return Launched(tokens, self._to_host(tokens), asked, failed)

    def _parameters(
        self, sequences: list[Sequence], choices: list[Choice], places: list[int]
    ) -> torch.Tensor | None:
        """[num_seqs, sampling.PARAMETERS] float64, or None if all rows are greedy."""
        if all(sequence.sampling.greedy for sequence in sequences):
            return None
        rows = [
            _parameters_of(sequence, uniform(choice.seed, place))
            for sequence, choice, place in zip(sequences, choices, places, strict=True)
        ]
        return sent(torch.tensor(rows, dtype=torch.float64), self._device)

    def _raw_logprobs(self, logits: torch.Tensor, asking: list[int]) -> torch.Tensor | None:
        """[num_asking, vocab_size], before anything shapes the logits."""
        if not asking:
            return None
        rows = logits.index_select(0, sent(torch.tensor(asking), self._device))
        return torch.log_softmax(rows, -1)

    def _ask(
        self,
        raw: torch.Tensor | None,
        asking: list[int],
        sequences: list[Sequence],
        tokens: torch.Tensor,
    ) -> Asked | None:
        if raw is None:
            return None
        chosen = tokens.index_select(0, sent(torch.tensor(asking), self._device))
        counts = [sequences[row].sampling.logprobs or 0 for row in asking]
        return Asked(asking, counts, *map(self._to_host, ranked(raw, chosen, max(counts))))

    def _to_host(self, values: torch.Tensor) -> torch.Tensor:
        pinned = self._device.type == "cuda"
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
        return host.copy_(values, non_blocking=pinned)


def _parameters_of(sequence: Sequence, number: float) -> tuple[float, ...]:
    """One row as the kernel reads it."""
    one = sequence.sampling
    temperature = 0.0 if one.greedy else one.temperature
    return temperature, float(one.top_k), one.top_p, one.min_p, number
