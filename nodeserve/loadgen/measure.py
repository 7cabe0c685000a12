"""From what clients saw to numbers: times, joint attainment, whether the run counts. Pure."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nodeserve.loadgen.blame import blame, missed_by
from nodeserve.loadgen.records import Sample
from nodeserve.plan.goodput import Slo, Tally, needed_scale, smallest_scale
from nodeserve.plan.records import Arrival
from nodeserve.plan.summary import spread

MAX_LATE_S = 0.010
LATE_SHARE = 0.01  # of the requests may be sent later than that
SloOf = Callable[[Arrival], Slo]


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds, with the number of samples behind them."""

    num: int
    mean: float
    std: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Punctuality:
    """How well the clients kept time: sends behind their time, and wake-ups behind theirs (a client
    that is too busy to send is also too busy to read). `reasons` say why a run does not count."""

    late_p50_s: float
    late_p99_s: float
    late_max_s: float
    late_share: float  # of the requests, by more than the limit
    lag_p99_s: float
    reasons: tuple[str, ...]

    @property
    def valid(self) -> bool:
        return not self.reasons


@dataclass(frozen=True, slots=True)
class Report:
    """One run. Counts and rates are of the requests that count: those due after the settling time,
    whatever became of them, but for those that an early end left unknown. Times are of those that
    ended well."""

    tally: Tally
    num_done: int
    errors: dict[str, int]
    duration_s: float  # from the first one's due time to the last token or error
    offered_per_s: float | None  # None in a closed loop
    prompt_tokens: int
    output_tokens: int
    good_tokens: int  # written for good requests
    ttft: Times | None
    tpot: Times | None
    itl: Times | None
    worst_gap: Times | None
    e2e: Times | None
    missed: dict[str, int]  # limits, by how many requests missed them
    blame: dict[str, int]  # stages, by how many misses they explain
    smallest_scale: float | None  # of the SLO, for the goal
    num_short: int  # ended well with fewer tokens than asked
    num_other_prompts: int  # whose length the server counts otherwise
    punctuality: Punctuality

    @property
    def requests_per_s(self) -> float:
        return self.num_done / self.duration_s if self.duration_s > 0.0 else 0.0

    @property
    def goodput_per_s(self) -> float:
        """Good requests a second of this run."""
        return self.tally.num_good / self.duration_s if self.duration_s > 0.0 else 0.0


def counts(sample: Sample, settle_s: float) -> bool:
    """Whether it was due after the settling time."""
    return settle_s <= 0.0 or _due_s(sample) >= settle_s


def measure(
    samples: Sequence[Sample],
    slo_of: SloOf,
    goal: float,
    lags_s: Sequence[float] = (),
    settle_s: float = 0.0,
    max_late_s: float = MAX_LATE_S,
    forced: bool = True,
) -> Report | None:
    """The numbers of a run of any order; None if nothing is known of requests due after `settle_s`.

    `lags_s` are what the clients' own timers were late by. In a closed loop the time of sending
    stands for the due time. `forced`: answers with fewer tokens than asked for are misses.
    """
    planned = [one for one in samples if counts(one, settle_s)]
    counted = [one for one in planned if one.is_known]
    if not counted:
        return None
    num_unknown = len(planned) - len(counted)
    slos = [slo_of(one.job.arrival) for one in counted]
    misses = [missed_by(one, slo, forced) for one, slo in zip(counted, slos, strict=True)]
    good = [not missed for missed in misses]
    done = [one for one in counted if one.error is None]
    began_s = min(map(_due_s, counted))
    missed = Counter(name for names in misses for name in names)
    return Report(
        tally=Tally(len(counted), sum(good), num_unknown),
        num_done=len(done),
        errors=dict(Counter(one.error for one in counted if one.error is not None)),
        duration_s=max(one.ended_s for one in counted) - began_s,
        offered_per_s=_offered(planned),
        prompt_tokens=sum(one.num_prompt_tokens for one in done),
        output_tokens=sum(one.num_output_tokens for one in done),
        good_tokens=sum(
            one.num_output_tokens for one, well in zip(counted, good, strict=True) if well
        ),
        ttft=_times([one.ttft_s for one in done]),
        tpot=_times([one.tpot_s for one in done]),
        itl=_times([gap for one in done for gap in one.gaps_s]),
        worst_gap=_times([one.worst_gap_s for one in done]),
        e2e=_times([one.e2e_s for one in done]),
        missed=dict(missed.most_common()),
        blame=blame(counted, slos, forced),
        smallest_scale=smallest_scale(
            [
                *(needed(one, slo, forced) for one, slo in zip(counted, slos, strict=True)),
                *[math.inf] * num_unknown,
            ],
            goal,
        ),
        num_short=sum(one.is_short for one in done),
        num_other_prompts=sum(
            one.num_prompt_tokens != one.job.arrival.num_prompt_tokens for one in done
        ),
        punctuality=punctuality([one for one in planned if one.was_sent], lags_s, max_late_s),
    )


def needed(sample: Sample, slo: Slo, forced: bool = True) -> float:
    """The SLO scale from which on the request is good; infinity for one that failed, or that is
    shorter than was forced."""
    if sample.error is not None or (forced and sample.is_short):
        return math.inf
    return needed_scale(slo, *sample.judged_s)


def punctuality(
    samples: Sequence[Sample], lags_s: Sequence[float], max_late_s: float = MAX_LATE_S
) -> Punctuality:
    """How late the clients were, and whether that is too late."""
    late = spread([one.late_s for one in samples])
    lag_p99_s = spread(lags_s).p99 if lags_s else 0.0
    share = sum(one.late_s > max_late_s for one in samples) / len(samples)
    reasons = []
    if share > LATE_SHARE:
        reasons.append(f"{share:.0%} of the requests were sent over {1e3 * max_late_s:g} ms late")
    if lag_p99_s > max_late_s:
        reasons.append(f"clients woke up to {1e3 * lag_p99_s:.0f} ms late (P99)")
    return Punctuality(
        late.p50,
        late.p99,
        max(one.late_s for one in samples),
        share,
        lag_p99_s,
        tuple(reasons),
    )


def _due_s(sample: Sample) -> float:
    return sample.sent_s if sample.due_s is None else sample.due_s


def _offered(samples: Sequence[Sample]) -> float | None:
    times = [one.due_s for one in samples if one.due_s is not None]
    if len(times) < 2 or max(times) == min(times):
        return None
    return (len(times) - 1) / (max(times) - min(times))


def _times(values: Sequence[float | None]) -> Times | None:
    known = [one for one in values if one is not None]
    if not known:
        return None
    middle = spread(known)
    std = statistics.pstdev(known, middle.mean)
    return Times(len(known), middle.mean, std, middle.p50, middle.p90, middle.p99)
