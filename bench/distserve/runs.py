"""One simulated run, and what is sought with runs: a rate, a scale of the limits."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from random import Random
from statistics import fmean
from typing import NamedTuple

from bench.distserve.cases import DISAGGREGATED, PREFILL_FIRST, Arm
from bench.distserve.data import lengths
from nodeserve.plan.records import Arrival, Engine, Scenario
from nodeserve.plan.simulator import simulate
from nodeserve.policy.profile import Family
from nodeserve.policy.profiles import FAMILIES
from nodeserve.policy.units import DispatchOptions

GOAL = 0.9
TOLERANCE = 0.03  # of a rate that is sought
RANGE = 64.0  # of rates, from the first one asked
STEP = 1.5  # between rates until the goal is between two: what is far too much takes long to run
MOST_SEQS = 256
# First come, first served, to the prefill instance with the shortest queue and to the decode
# instance with the fewest requests: what the paper describes, not nodeserve's own window.
DISPATCH, ALLOCATION = "shortest-queue", "fewest-requests"


class Limits(NamedTuple):
    ttft_s: float = math.inf
    tpot_s: float = math.inf


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
    ttft_s: float
    tpot_s: float  # 0 for an answer of one token


@cache
def _unit_arrivals(name: str, num: int, seed: int) -> tuple[tuple[float, int, int], ...]:
    """Poisson arrivals, one a second on average over the run exactly: the authors' saved traces
    have so many in so much time. `name` is of lengths, or PROMPT+ANSWER of fixed ones."""
    random = Random(f"{name} {seed}")
    if "+" in name:
        prompt, _, output = name.partition("+")
        pairs = [(int(prompt), int(output))]
    else:
        pairs = list(lengths(name))
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
    """Times of each request, in order; one that is refused has infinite ones."""
    scenario = Scenario(
        arm.layout,
        family or FAMILIES[arm.family],
        DispatchOptions(DISPATCH, budget=arm.budget, max_num_seqs=MOST_SEQS),
        decode_allocation=ALLOCATION if arm.way == DISAGGREGATED else "cost",
        noise=0.0,
        engine=Engine(prefill_first=arm.way == PREFILL_FIRST),
    )
    return [
        Times(one.timings.ttft_s, one.tpot_s or 0.0)
        if one.outcome == "length"
        else Times(math.inf, math.inf)
        for one in simulate(scenario, requests).served
    ]


def counted(
    arm: Arm,
    name: str,
    gpu_rate: float,
    protocol: Protocol,
    *,
    num_gpus: int = 0,
    family: Family | None = None,
) -> list[list[Times]]:
    """Of each seed the times of the requests that count, at so many requests a second and GPU."""
    num_gpus = num_gpus or arm.num_gpus
    rate, runs = gpu_rate * num_gpus, []
    for seed in protocol.seeds:
        requests = arrivals(name, rate, protocol.num_requests(rate, num_gpus), seed)
        times = serve(arm, requests, family)
        late = [
            one
            for one, request in zip(times, requests, strict=True)
            if request.arrived_s >= protocol.warm_up_s
        ]
        runs.append(late)
    return runs


def attained(runs: Sequence[Sequence[Times]], limits: Limits) -> float:
    """The mean share of requests within both limits."""
    return fmean(
        fmean(one.ttft_s <= limits.ttft_s and one.tpot_s <= limits.tpot_s for one in run)
        for run in runs
    )


def smallest_scale(runs: Sequence[Sequence[Times]], limits: Limits) -> float:
    """By which both limits could be multiplied so that GOAL is just attained."""
    scales = [
        sorted(max(one.ttft_s / limits.ttft_s, one.tpot_s / limits.tpot_s) for one in run)
        for run in runs
    ]
    return fmean(scale[math.ceil(GOAL * len(scale)) - 1] for scale in scales)


def highest_rate(ask: Callable[[float], float], start: float) -> float:
    """The highest rate at which `ask` gives GOAL or more, to TOLERANCE: by steps, then bisection.
    0: not at a 64th of `start`, which is asked as soon as a rate fails; at most 64 times it."""
    low, high, rate = 0.0, math.inf, start
    while high > low * (1 + TOLERANCE) and low < RANGE * start:
        if ask(rate) >= GOAL:
            low = rate
        else:
            if high == math.inf and not low and ask(start / RANGE) < GOAL:
                return 0.0
            high = rate
        rate = STEP * low if high == math.inf else math.sqrt(low * high) if low else high / STEP
    return low
