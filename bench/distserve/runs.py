"""One simulated run, and what is asked of it: a share, a scale of the limits, a rate."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from random import Random
from typing import NamedTuple

from bench.distserve.cases import PREFILL_FIRST, Arm
from bench.distserve.data import pairs_of
from nodeserve.plan.goodput import GOAL, Slo, Tally, needed_scale, smallest_scale
from nodeserve.plan.records import Arrival, Engine, Scenario, Served
from nodeserve.plan.search import Probe, SearchOptions, find_goodput
from nodeserve.plan.simulator import Simulation, simulate
from nodeserve.policy.profile import Family
from nodeserve.policy.profiles import FAMILIES
from nodeserve.policy.units import DispatchOptions

TOLERANCE = 0.03  # of a rate that is sought
RANGE = 64.0  # of rates, down and up from the first one asked
MOST_SEQS = 256
# First come, first served, to the prefill instance with the shortest queue and to the decode
# instance with the fewest requests: what the paper describes, not nodeserve's own window.
DISPATCH, ALLOCATION = "shortest-queue", "fewest-requests"


class Protocol(NamedTuple):
    """How many requests a run has, and from which second on they count."""

    seeds: tuple[int, ...]
    per_gpu: int = 0  # requests; the rest is ignored then
    seconds: float = 0.0
    warm_up_s: float = 0.0

    def num_requests(self, rate: float, num_gpus: int) -> int:
        if self.per_gpu:
            return self.per_gpu * num_gpus
        return max(200, round(rate * self.seconds))


class Times(NamedTuple):
    """Of one request, as nodeserve.plan.goodput takes them."""

    ttft_s: float | None  # None: it was refused
    tpot_s: float | None  # None: an answer of one token


@cache
def _unit_arrivals(name: str, num: int, seed: int) -> tuple[tuple[float, int, int], ...]:
    """Poisson arrivals, one a second on average over the run exactly: the authors' saved traces
    have so many in so much time. `name` is one of data.pairs_of."""
    random = Random(f"{name} {seed}")
    pairs = pairs_of(name)
    gaps = [random.expovariate(1.0) for _ in range(num)]
    scale = num / math.fsum(gaps)
    now, made = 0.0, []
    for gap in gaps:
        now += gap * scale
        made.append((now, *random.choice(pairs)))
    return tuple(made)


def arrivals(name: str, rate: float, num: int, seed: int) -> list[Arrival]:
    """`rate` in requests a second of the whole node."""
    return [
        Arrival(at / rate, prompt, output) for at, prompt, output in _unit_arrivals(name, num, seed)
    ]


def serve(arm: Arm, requests: Sequence[Arrival], family: Family | None = None) -> list[Times]:
    """Times of each request, in order."""
    return [times_of(one) for one in simulate(_scenario(arm, family), requests).served]


def _scenario(arm: Arm, family: Family | None) -> Scenario:
    return Scenario(
        arm.layout,
        family or FAMILIES[arm.family],
        DispatchOptions(DISPATCH, budget=arm.budget, max_num_seqs=MOST_SEQS),
        decode_allocation=ALLOCATION,
        noise=0.0,
        engine=Engine(prefill_first=arm.way == PREFILL_FIRST),
    )


def times_of(one: Served) -> Times:
    if one.outcome != "length":
        return Times(None, None)
    return Times(one.timings.ttft_s, one.tpot_s)


class Load(NamedTuple):
    """What an arm gets. `family` instead of its own, `num_gpus` instead of its own: 0, None."""

    arm: Arm
    lengths: str
    protocol: Protocol
    num_gpus: int = 0
    family: Family | None = None

    def runs(self, gpu_rate: float) -> list[list[Arrival]]:
        """For each seed the requests, at so many a second and GPU."""
        num_gpus = self.num_gpus or self.arm.num_gpus
        rate = gpu_rate * num_gpus
        number = self.protocol.num_requests(rate, num_gpus)
        return [arrivals(self.lengths, rate, number, seed) for seed in self.protocol.seeds]

    def counts(self, request: Arrival) -> bool:
        return request.arrived_s >= self.protocol.warm_up_s


def counted(load: Load, gpu_rate: float) -> list[Times]:
    """Of all seeds the requests that count."""
    return [
        times
        for requests in load.runs(gpu_rate)
        for times, request in zip(serve(load.arm, requests, load.family), requests, strict=True)
        if load.counts(request)
    ]


def at_most(load: Load, gpu_rate: float, limits: Slo) -> Tally:
    """Whether a rate attains the goal, told by a share that is on the same side of it as what is
    attained: as soon as too many have missed, or so many have not that the rest does not matter,
    nothing more is run."""
    runs = load.runs(gpu_rate)
    num_offered = sum(load.counts(one) for requests in runs for one in requests)
    most_missed = math.floor((1.0 - GOAL) * num_offered + 1e-9)
    num_missed = num_met = 0

    def note(served: Served) -> None:
        nonlocal num_missed, num_met
        if load.counts(served.arrival):
            met = limits.met(*times_of(served))
            num_met, num_missed = num_met + met, num_missed + (not met)

    for requests in runs:
        run = Simulation(_scenario(load.arm, load.family), requests)
        run.ended = note
        run.start()
        while run.num_open and num_missed <= most_missed < num_offered - num_met:
            run.turn()
    return Tally(num_offered, num_offered - num_missed)


def tally(times: Sequence[Times], limits: Slo) -> Tally:
    """How many are within both limits."""
    return Tally(len(times), sum(limits.met(*one) for one in times))


def smallest(times: Sequence[Times], limits: Slo) -> float | None:
    """By which both limits could be multiplied so that the goal is just attained."""
    return smallest_scale([needed_scale(limits, *one) for one in times])


def highest_rate(ask: Callable[[float], Tally], start: float, least: float = 0.0) -> float:
    """The highest rate that attains the goal, to TOLERANCE, between a RANGE-th of `start` and RANGE
    times it; 0 if none does. With `least` that is the first rate asked, and the lowest."""
    first = least or start
    options = SearchOptions(
        start=first,
        low=least or start / RANGE,
        high=RANGE * max(first, start),
        tolerance=TOLERANCE,
        min_requests=1,
        max_requests=1,  # how many a run has, the protocol says: each rate is asked once
    )
    return find_goodput(lambda rate, _: Probe(rate, ask(rate)), options).rate
