"""Whether a new request may come in: bounds of the buffer, and SLOs that can still be met.

A refusal is final for the client, so it takes certainty: where nothing is predicted, or the miss is
within what predictions are off by, the request comes in. Turning traffic away on an estimate that
is too high was seen to refuse mostly what could have been served.
"""

import enum
import math
from dataclasses import dataclass
from typing import NamedTuple

SURE = 0.9  # of a predicted time: less than that it hardly takes
LEAST_RETRY_S = 0.1  # before that, nothing will have changed
RETRY_S = 1.0  # where nothing is predicted


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
    """Bounds of what waits before prefill, and what becomes of a request that would miss its SLO:
    `on_overload` is reject, or queue: behind those of its priority that can meet theirs."""

    max_num_queued_reqs: int
    max_num_queued_tokens: int
    on_overload: str = "reject"


def judge(
    options: FlowOptions,
    buffered: Buffered,
    num_tokens: int,
    ttft_slo_s: float | None,
    predicted_ttft_s: float | None,
) -> Judgement:
    """Judge a request of `num_tokens`, whose first token is predicted in `predicted_ttft_s`
    (None: nothing is known yet).

    The bounds hold for everybody, whatever `on_overload` says, but a request that would wait alone
    is never too long. A refusal's `retry_after_s` is when the SLO could be met if what waits now is
    served and nothing comes; of a full buffer, when what waits is served.
    """
    if full := _full(options, buffered, num_tokens):
        again_s = _again_s(RETRY_S if predicted_ttft_s is None else predicted_ttft_s)
        return Judgement(Verdict.REJECT, again_s, f"{full}: try again in {again_s:.1f} s")
    if ttft_slo_s is None or predicted_ttft_s is None:
        return Judgement(Verdict.ADMIT)
    if not SURE * predicted_ttft_s > ttft_slo_s:
        return Judgement(Verdict.ADMIT)
    miss = f"the first token would take {predicted_ttft_s:.3g} s, the SLO is {ttft_slo_s:.3g} s"
    if options.on_overload == "queue":
        return Judgement(Verdict.BEST_EFFORT, reason=miss)
    again_s = _again_s(predicted_ttft_s - ttft_slo_s)
    return Judgement(Verdict.REJECT, again_s, f"{miss}: try again in {again_s:.1f} s")


def _full(options: FlowOptions, buffered: Buffered, num_tokens: int) -> str:
    """What is full, or nothing."""
    if buffered.num_requests >= options.max_num_queued_reqs:
        return f"{buffered.num_requests} requests are waiting already"
    if buffered.num_requests and buffered.num_tokens + num_tokens > options.max_num_queued_tokens:
        return f"{buffered.num_tokens} prompt tokens are waiting already"
    return ""


def _again_s(seconds: float) -> float:
    return max(LEAST_RETRY_S, seconds) if math.isfinite(seconds) else RETRY_S
