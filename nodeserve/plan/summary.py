"""What a simulation shows, in numbers: times of requests, and how passes were filled.

The first 15 % and the last 5 % of the requests, by arrival, are left out, and passes that began
before the first or after the last arrival of the rest: a node that fills or runs empty is another
system.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from nodeserve.plan.goodput import Slo
from nodeserve.plan.records import Outcome, Pass, Scenario, Served
from nodeserve.types import Role

WARM_UP = 0.15
RUN_OUT = 0.05
Request = TypeVar("Request")

STAGES = ("scheduler_wait_s", "transit_s", "device_wait_s", "prefill_s", "return_s")


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class PrefillPasses:
    """How passes with prefill work were filled and timed.

    `phase_spread` is from the share of its pass that each other running instance has behind it when
    a pass begins: 1 where pass starts are evenly staggered, 0 at random, negative where instances
    start together. None with one instance, or where passes never overlap.
    """

    num_passes: int
    mean_s: float
    chunk_utilisation: float  # tokens over those that there was room for
    balance: float  # mean over maximum of the ranks' own costs
    active_ranks: float  # that had tokens, of those of an instance
    busy_share: float  # of the time of the instances that prefill, whatever they did
    gap_s: float  # between two passes
    phase_spread: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """`outcomes` counts all requests; the rest is about the kept ones that ended well."""

    outcomes: dict[str, int]
    num_requests: int
    duration_s: float  # from the first kept arrival to the last
    ttft_s: Spread
    stages: dict[str, Spread]  # of the TTFT, by their names in types.Timings
    handoff_s: Spread | None  # wait and copy, where there was a handoff
    tpot_s: Spread | None
    max_rounds: int  # departures that left a request behind
    num_preemptions: int
    requests_per_s: float
    attained: float | None  # share of kept requests that met their SLOs; None: there are none
    goodput_per_s: float | None  # requests that did
    prefill: PrefillPasses | None


def spread(values: Sequence[float]) -> Spread:
    """Mean and percentiles, with linear interpolation, of one value or more."""
    line = sorted(values)

    def quantile(share: float) -> float:
        place = share * (len(line) - 1)
        low = int(place)
        high = min(low + 1, len(line) - 1)
        return line[low] + (place - low) * (line[high] - line[low])

    return Spread(math.fsum(line) / len(line), quantile(0.5), quantile(0.9), quantile(0.99))


def kept(requests: Sequence[Request]) -> Sequence[Request]:
    """Of requests in the order of their arrival, without those at the start and at the end."""
    return requests[int(WARM_UP * len(requests)) : math.ceil((1.0 - RUN_OUT) * len(requests))]


def summarize(outcome: Outcome, scenario: Scenario) -> Summary | None:
    """The numbers of a run; None if no kept request ended well."""
    steady = kept(outcome.served)
    done = [one for one in steady if one.outcome in ("stop", "length")]
    if not done:
        return None
    timings = [one.timings for one in done]
    began_s, ended_s = steady[0].arrival.arrived_s, steady[-1].arrival.arrived_s
    span_s = ended_s - began_s
    handoffs = [one.handoff_wait_s + one.handoff_s for one in timings if one.handoff_bytes]
    tpots = [one.tpot_s for one in done if one.tpot_s is not None]
    judged = [one for one in steady if one.arrival.ttft_slo_s or one.arrival.tpot_slo_s]
    num_good = sum(map(met_slo, judged))
    return Summary(
        outcomes=dict(sorted(Counter(one.outcome for one in outcome.served).items())),
        num_requests=len(done),
        duration_s=span_s,
        ttft_s=spread([one.ttft_s for one in timings]),
        stages={name: spread([getattr(one, name) for one in timings]) for name in STAGES},
        handoff_s=spread(handoffs) if handoffs else None,
        tpot_s=spread(tpots) if tpots else None,
        max_rounds=max(one.num_rounds for one in timings),
        num_preemptions=sum(one.num_preemptions for one in timings),
        requests_per_s=_over(len(done), span_s),
        attained=num_good / len(judged) if judged else None,
        goodput_per_s=_over(num_good, span_s) if judged else None,
        prefill=_prefill_passes(outcome.passes, scenario, began_s, ended_s),
    )


def met_slo(served: Served) -> bool:
    """Whether a request ended well and in time; one without a TPOT has none to miss."""
    if served.outcome not in ("stop", "length"):
        return False
    arrival = served.arrival
    return Slo(arrival.ttft_slo_s, arrival.tpot_slo_s).met(served.timings.ttft_s, served.tpot_s)


def _over(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0.0 else 0.0


def _prefill_passes(
    passes: Sequence[Pass], scenario: Scenario, began_s: float, ended_s: float
) -> PrefillPasses | None:
    instances = scenario.instances
    inside = [
        one
        for one in passes
        if began_s <= one.began_s <= ended_s and instances[one.instance].role is not Role.DECODE
    ]
    filled = [one for one in inside if any(work.prefill_tokens for work in one.ranks)]
    if not filled:
        return None
    costs = [
        [instances[one.instance].profile.cost.own_s(work) for work in one.ranks] for one in filled
    ]
    balances = [sum(own) / len(own) / max(own) for own in costs if max(own)]
    room = sum(len(one.ranks) for one in filled) * scenario.dispatch.budget
    active = [sum(work.prefill_tokens > 0 for work in one.ranks) for one in filled]
    num_instances = sum(one.role is not Role.DECODE for one in instances)
    return PrefillPasses(
        num_passes=len(filled),
        mean_s=math.fsum(one.seconds for one in filled) / len(filled),
        chunk_utilisation=sum(work.prefill_tokens for one in filled for work in one.ranks) / room,
        balance=sum(balances) / len(balances) if balances else 1.0,
        active_ranks=sum(active) / len(active),
        busy_share=_over(_busy_s(inside, ended_s), num_instances * (ended_s - began_s)),
        gap_s=math.fsum(one.gap_s for one in filled) / len(filled),
        phase_spread=_phase_spread(inside, num_instances),
    )


def _busy_s(passes: Sequence[Pass], ended_s: float) -> float:
    return math.fsum(min(one.seconds, ended_s - one.began_s) for one in passes)


def _phase_spread(passes: Sequence[Pass], num_instances: int) -> float | None:
    """Mean cosine of the phases of the other running instances at each start, scaled so that evenly
    staggered starts give 1: their phases are 1/N ... (N-1)/N, whose cosines sum to -1."""
    running: dict[int, Pass] = {}
    cosines: list[float] = []
    for one in sorted(passes, key=lambda one: one.began_s):
        for other in running.values():
            behind = (one.began_s - other.began_s) / other.seconds if other.seconds else 1.0
            if other.instance != one.instance and behind < 1.0:
                cosines.append(math.cos(2.0 * math.pi * behind))
        running[one.instance] = one
    if not cosines:
        return None
    return -(num_instances - 1) * sum(cosines) / len(cosines)
