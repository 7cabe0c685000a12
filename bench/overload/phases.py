"""What is sent, phase after phase on one schedule, and what became of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bench.report import percentile
from nodeserve.errors import Overloaded
from nodeserve.loadgen.records import Sample
from nodeserve.plan.goodput import Slo
from nodeserve.plan.records import Arrival
from nodeserve.plan.requests import Requests


class Phase(NamedTuple):
    """`rate` requests a second for `seconds`, after nothing for `pause_s`."""

    name: str
    rate: float
    seconds: float
    pause_s: float = 0.0


class Span(NamedTuple):
    """When a phase's requests are due, from the start of its run."""

    phase: Phase
    begins_s: float
    ends_s: float


@dataclass(frozen=True, slots=True)
class Figures:
    """A phase by its requests: those due in it. Times are the client's, in seconds."""

    phase: Phase
    num_offered: int
    num_accepted: int
    num_good: int  # of these, within both limits
    ttft_s: tuple[float, float]  # P50, P99 of the accepted ones
    tpot_s: tuple[float, float]
    return_s: tuple[float, float]  # from a pass's end to the coordinator knowing of it
    refused_s: tuple[float, float]  # from sending to having been refused
    num_without_retry: int  # refused ones that were not told when to come again
    errors: dict[str, int]  # ends that are neither well nor refusals, by code

    @property
    def attained(self) -> float:
        """Share of the accepted requests that were in time."""
        return self.num_good / self.num_accepted if self.num_accepted else 0.0

    @property
    def attained_of_all(self) -> float:
        """Share of all."""
        return self.num_good / self.num_offered if self.num_offered else 0.0

    @property
    def good_per_s(self) -> float:
        return self.num_good / self.phase.seconds


def schedule(requests: Requests, phases: Sequence[Phase]) -> tuple[list[Arrival], list[Span]]:
    """The phases one after the other; each has the workload's own arrivals at its rate."""
    arrivals: list[Arrival] = []
    spans = []
    begins_s = 0.0
    for phase in phases:
        begins_s += phase.pause_s
        chosen = requests.first(max(2, round(phase.rate * phase.seconds)), phase.rate)
        first_s = chosen[0].arrived_s - begins_s
        arrivals += [one._replace(arrived_s=one.arrived_s - first_s) for one in chosen]
        ends_s = begins_s + phase.seconds
        spans.append(Span(phase, begins_s, ends_s))
        begins_s = max(ends_s, arrivals[-1].arrived_s)
    return arrivals, spans


def figures(span: Span, samples: Sequence[Sample], slo: Slo, settle_s: float = 0.0) -> Figures:
    """Of the requests due in a span; those of its first `settle_s` do not count."""
    begins_s = span.begins_s + settle_s
    mine = [one for one in samples if begins_s <= one.job.arrival.arrived_s < span.ends_s]
    refused = [one for one in mine if one.error == Overloaded.code]
    accepted = [one for one in mine if one.error != Overloaded.code]
    errors: dict[str, int] = {}
    for one in accepted:
        if one.error is not None:
            errors[one.error] = errors.get(one.error, 0) + 1
    return Figures(
        span.phase._replace(seconds=span.ends_s - begins_s),
        len(mine),
        len(accepted),
        sum(one.error is None and slo.met(one.ttft_s, one.tpot_s) for one in accepted),
        _pair([one.ttft_s for one in accepted if one.ttft_s is not None]),
        _pair([one.tpot_s for one in accepted if one.tpot_s is not None]),
        _pair([one.timings.return_s for one in accepted if one.timings and one.times]),
        _pair([one.ended_s - one.sent_s for one in refused]),
        sum(not one.retry_after_s for one in refused),
        errors,
    )


def _pair(values: Sequence[float]) -> tuple[float, float]:
    return (percentile(values, 0.5), percentile(values, 0.99)) if values else (0.0, 0.0)
