"""Whether a new request may come in: bounds of the buffer, and SLOs that can still be met.

A refusal is final for the client, so it takes knowledge: where nothing is predicted, the request
comes in. What is predicted is held against what came of such predictions (foresight.py), since the
queue grows up to this line: drawn too far out, all that it lets in are late.
"""

import enum
import math
from dataclasses import dataclass
from typing import NamedTuple

from nodeserve.policy.foresight import Forecast
from nodeserve.types import Slo

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
    limit: str = ""  # ttft or tpot: the one that would be missed


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


NO_OBJECTIVE = Slo()


def judge(
    options: FlowOptions,
    buffered: Buffered,
    num_tokens: int,
    slo: Slo,
    forecast: Forecast | None,
) -> Judgement:
    """Judge a request of `num_tokens` by what is forecast for it (None: nothing is known yet).

    The bounds hold for everybody, whatever `on_overload` says, but a request that would wait alone
    is never too long. A refusal's `retry_after_s` is when the SLO could be met if what waits now is
    served and nothing comes; of a full buffer, when what waits is served.
    """
    if full := _full(options, buffered, num_tokens):
        again_s = _again_s(RETRY_S if forecast is None else forecast.first.whole_s)
        return Judgement(Verdict.REJECT, again_s, f"{full}: try again in {again_s:.1f} s")
    miss = None if forecast is None else _miss(slo, forecast)
    if miss is None:
        return Judgement(Verdict.ADMIT)
    words, again_s = miss.words, _again_s(miss.again_s)
    if options.on_overload == "queue":
        return Judgement(Verdict.BEST_EFFORT, 0.0, words, miss.limit)
    words = f"{words}: try again in {again_s:.1f} s"
    return Judgement(Verdict.REJECT, again_s, words, miss.limit)


class _Miss(NamedTuple):
    limit: str
    words: str
    again_s: float


def _miss(slo: Slo, forecast: Forecast) -> _Miss | None:
    """Which limit is too near, if one is."""
    late_s, slow_s = forecast.safe_ttft_s, forecast.safe_tpot_s
    if slo.ttft_s is not None and late_s > slo.ttft_s:
        words = f"the first token may take {late_s:.3g} s, the SLO is {slo.ttft_s:.3g} s"
        return _Miss("ttft", words, late_s - slo.ttft_s)
    if slo.tpot_s is not None and slow_s is not None and slow_s > slo.tpot_s:
        words = f"a token may take {slow_s:.3g} s, the SLO is {slo.tpot_s:.3g} s"
        return _Miss("tpot", words, forecast.stay_s * (1.0 - slo.tpot_s / slow_s))
    return None


def _full(options: FlowOptions, buffered: Buffered, num_tokens: int) -> str:
    """What is full, or nothing."""
    if buffered.num_requests >= options.max_num_queued_reqs:
        return f"{buffered.num_requests} requests are waiting already"
    if buffered.num_requests and buffered.num_tokens + num_tokens > options.max_num_queued_tokens:
        return f"{buffered.num_tokens} prompt tokens are waiting already"
    return ""


def _again_s(seconds: float) -> float:
    return max(LEAST_RETRY_S, seconds) if math.isfinite(seconds) else RETRY_S
