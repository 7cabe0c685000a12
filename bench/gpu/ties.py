"""When two greedy continuations may differ: only where the reference itself hardly prefers one.

In 16 bits two right implementations round differently, so the first different token must be one
whose logit in the reference is within `tolerance` of the highest; after it the contexts differ and
nothing can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Difference:
    """The first place where an answer leaves the reference's choice."""

    place: int
    gap: float  # the highest logit minus that of the token taken


def first_difference(answer: Sequence[int], logits: Sequence[Sequence[float]]) -> Difference | None:
    """Of an answer and the reference's logits before each of its tokens; None: they agree."""
    if len(answer) != len(logits):
        raise ValueError(f"{len(answer)} tokens and logits for {len(logits)}")
    for place, (token_id, row) in enumerate(zip(answer, logits, strict=True)):
        highest = max(row)
        if row[token_id] < highest:
            return Difference(place, highest - row[token_id])
    return None


def first_parting(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place where two answers differ; None: neither goes on alone nor differs."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return None if len(one) == len(other) else min(len(one), len(other))


def is_tie(difference: Difference | None, tolerance: float) -> bool:
    """Whether the answer agrees, or parts where the reference nearly ties. NaN is no tie."""
    return difference is None or difference.gap <= tolerance
