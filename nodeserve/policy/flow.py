"""Whether a new request may come in: bounds of the buffer, and SLOs that can still be met."""

import enum
from dataclasses import dataclass
from typing import NamedTuple


class Verdict(enum.Enum):
    ADMIT = enum.auto()
    BEST_EFFORT = enum.auto()  # take it, behind those that can meet their SLO
    REJECT = enum.auto()


class Judgement(NamedTuple):
    verdict: Verdict
    retry_after_s: float = 0.0  # with REJECT: when it may be worth another try
    reason: str = ""


class Buffered(NamedTuple):
    """What waits already."""

    num_requests: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class FlowOptions:
    max_num_queued_reqs: int
    max_num_queued_tokens: int
    on_overload: str = "reject"  # or queue


def judge(
    options: FlowOptions,
    buffered: Buffered,
    num_tokens: int,
    ttft_slo_s: float | None,
    predicted_ttft_s: float | None,
) -> Judgement:
    """Judge a request of `num_tokens`, whose first token is predicted in `predicted_ttft_s`
    (None: nothing is known yet)."""
    if buffered.num_requests >= options.max_num_queued_reqs:
        reason = f"{buffered.num_requests} requests are waiting already: try again later"
        return Judgement(Verdict.REJECT, predicted_ttft_s or 1.0, reason)
    return Judgement(Verdict.ADMIT)
