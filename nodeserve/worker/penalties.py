"""What changes logits before the choice: bias, minimum length, then penalties, as in vLLM.

Repetition counts prompt and output, presence and frequency the output alone. Only tokens that a row
names are touched: one gather and one scatter over all (row, token) pairs of the step, from lists
that each sequence keeps and extends by its new tokens. On a GPU the lists travel from pinned memory
and nothing waits.
"""

import os
from array import array
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nodeserve.policy.batching import Sequence

Tokens = NDArray[np.int64]
Counts = NDArray[np.float32]


class Choice:
    """The sampler's notes on one sequence."""

    __slots__ = (
        *("_counts", "_num_seen", "_places", "_tokens"),
        *("constrained", "follower", "penalised", "plain", "seed"),
    )

    def __init__(self, sequence: Sequence) -> None:
        sampling = sequence.sampling
        self.plain = sampling.greedy and not sampling.shapes_logits and sampling.logprobs is None
        seed = sampling.seed
        self.seed: int = int.from_bytes(os.urandom(8), "little") if seed is None else seed
        self.penalised = sampling.penalises
        self.constrained = sampling.constraint is not None
        self.follower: Any = None  # of its constraint, made by worker.constraints
        self._places: dict[int, int] = {}  # token id -> place in the two lists
        self._tokens = array("q")
        self._counts = array("f")  # times in the output
        only_output = sampling.repetition_penalty == 1.0
        self._num_seen = sequence.num_prompt_tokens if only_output else 0

    def tokens_and_counts(
        self, sequence: Sequence
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Every token that counts, once, and how often it is in the output."""
        for at in range(self._num_seen, len(sequence.token_ids)):
            token_id = sequence.token_ids[at]
            place = self._places.setdefault(token_id, len(self._tokens))
            if place == len(self._tokens):
                self._tokens.append(token_id)
                self._counts.append(0.0)
            if at >= sequence.num_prompt_tokens:
                self._counts[place] += 1.0
        self._num_seen = len(sequence.token_ids)
        return np.array(self._tokens), np.array(self._counts)


def sent(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`values` on `device`, ordered on its current stream; the host goes on at once."""
    if device.type != "cuda":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def shape_logits(
    logits: torch.Tensor, sequences: list[Sequence], choices: list[Choice], places: list[int]
) -> None:
    """In place. logits [num_seqs, vocab_size] float32; places: the number of each one's outputs"""
    _add_bias(logits, sequences)
    _forbid_early_stops(logits, sequences, places)
    _penalise(logits, sequences, choices)


def _add_bias(logits: torch.Tensor, sequences: list[Sequence]) -> None:
    rows, columns, values = [], [], []
    for row, sequence in enumerate(sequences):
        for token_id, value in sequence.sampling.logit_bias.items():
            rows.append(row)
            columns.append(token_id)
            values.append(float(value))
    if rows:
        where = _pairs(rows, columns, logits.device)
        logits[where] += sent(torch.tensor(values), logits.device)


def _pairs(
    rows: list[int], columns: list[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    return sent(torch.tensor(rows), device), sent(torch.tensor(columns), device)


def _forbid_early_stops(logits: torch.Tensor, sequences: list[Sequence], places: list[int]) -> None:
    rows: list[int] = []
    columns: list[int] = []
    for row, sequence in enumerate(sequences):
        if places[row] < sequence.sampling.min_tokens:
            rows.extend([row] * len(sequence.stop_ids))
            columns.extend(sequence.stop_ids)
    if rows:
        logits.index_put_(_pairs(rows, columns, logits.device), logits.new_full((), -torch.inf))


def _penalise(logits: torch.Tensor, sequences: list[Sequence], choices: list[Choice]) -> None:
    penalised = [row for row, choice in enumerate(choices) if choice.penalised]
    if not penalised:
        return
    lists = [choices[row].tokens_and_counts(sequences[row]) for row in penalised]
    lengths = torch.tensor([len(tokens) for tokens, _ in lists])
    sampling = [sequences[row].sampling for row in penalised]

    device = logits.device

    def spread(values: list[float] | list[int]) -> torch.Tensor:
        return sent(torch.tensor(values).repeat_interleave(lengths), device)

    tokens = torch.from_numpy(np.concatenate([one for one, _ in lists]))
    where = (spread(penalised), sent(tokens, device))
    counts = sent(torch.from_numpy(np.concatenate([one for _, one in lists])), device)
    repetition = spread([float(one.repetition_penalty) for one in sampling])
    frequency = spread([float(one.frequency_penalty) for one in sampling])
    presence = spread([float(one.presence_penalty) for one in sampling])
    values = logits[where]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= counts * frequency
    values -= (counts > 0) * presence
    logits[where] = values
