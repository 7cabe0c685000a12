"""Runs that are asked for together, spread over processes; each is a function and its arguments."""

import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from typing import NamedTuple, TypeVar

from bench.distserve.cases import (
    CHUNKED,
    CHUNKS,
    DISAGGREGATED,
    DISAGGREGATED_BUDGET,
    Arm,
    Case,
)
from bench.distserve.data import pairs_of
from bench.distserve.runs import (
    MOST_SEQS,
    TOLERANCE,
    Load,
    at_most,
    counted,
    highest_rate,
    smallest,
    tally,
)
from nodeserve.plan.bounds import bound, demand_of
from nodeserve.plan.candidates import Candidate, kinds_of
from nodeserve.plan.goodput import GOAL, Slo
from nodeserve.policy.profiles import FAMILIES

T = TypeVar("T")
R = TypeVar("R")
BATCH = 2  # searches of a race that are given out together


class Ask(NamedTuple):
    """What an arm gets, and the limits that it has."""

    load: Load
    limits: Slo
    start: float  # rate a GPU at which a search begins
    least: float = 0.0  # lower ones are not wanted


class Sought(NamedTuple):
    arm: Arm
    rate: float  # requests a second and GPU


class Scaled(NamedTuple):
    """What is attained with limits of several scales; `smallest`: as in `scale_at`."""

    shares: list[float]
    smallest: float | None


class Pool(ExitStack):
    """`jobs` processes; with one, this one does the work."""

    def __init__(self, jobs: int) -> None:
        super().__init__()
        spawn = multiprocessing.get_context("spawn")
        self._processes = self.enter_context(spawn.Pool(jobs)) if jobs > 1 else None

    def each(self, function: Callable[[T], R], tasks: Sequence[T], name: str = "") -> Iterator[R]:
        """The results in the order of the tasks; says what it does, if that has a name."""
        if name:
            print(f"{name}: {len(tasks)} tasks", file=sys.stderr, flush=True)
        if self._processes is None:
            return map(function, tasks)
        return self._processes.imap(function, tasks)


def seek(ask: Ask) -> Sought:
    """The highest rate that attains the goal."""
    rate = highest_rate(
        lambda gpu_rate: at_most(ask.load, gpu_rate, ask.limits), ask.start, ask.least
    )
    return Sought(ask.load.arm, rate)


def share_at(asked: tuple[Ask, float]) -> float:
    """What is attained at one rate."""
    ask, rate = asked
    return tally(counted(ask.load, rate), ask.limits).share


def scale_at(asked: tuple[Ask, float]) -> float | None:
    """The smallest scale of the limits at one rate."""
    ask, rate = asked
    return smallest(counted(ask.load, rate), ask.limits)


def scaled_at(asked: tuple[Ask, float, Sequence[float]]) -> Scaled:
    """One run at one rate, judged by the limits times each of these."""
    ask, rate, scales = asked
    times = counted(ask.load, rate)
    shares = [tally(times, ask.limits.scaled(scale)).share for scale in scales]
    return Scaled(shares, smallest(times, ask.limits))


def race(asks: Sequence[Ask], pool: Pool | None = None) -> Sought:
    """The arm with the highest rate a GPU, to TOLERANCE; if none attains the goal, the first of the
    most promising.

    The most promising on paper go first. Whoever comes later is asked first at a little more than
    the best rate so far, and most are out with that. Where on paper too few first tokens are in
    time, nothing is run. The bounds themselves put nobody out: they are those of a steady state,
    and short runs attain more.
    """
    ranked = sorted(((_most(ask), ask) for ask in asks), key=lambda one: -one[0])
    line = [ask for most, ask in ranked if most > 0.0]
    best = Sought(ranked[0][1].load.arm, 0.0)
    run = map if pool is None else pool.each
    while line:
        batch, line = line[:BATCH], line[BATCH:]
        better = (1.0 + TOLERANCE) * best.rate
        found = run(seek, [ask._replace(least=better) for ask in batch])
        best = max([best, *found], key=lambda one: (one.rate, -one.arm.num_gpus))
    return best


def _most(ask: Ask) -> float:
    """What a GPU can serve at most in a steady state."""
    arm = ask.load.arm
    candidate = Candidate(arm.layout, arm.budget)
    kinds = kinds_of(FAMILIES[arm.family], arm.num_gpus)
    demand = demand_of(pairs_of(ask.load.lengths))
    return bound(candidate, kinds, demand, ask.limits, GOAL, MOST_SEQS) / arm.num_gpus


def units(family: str, num_gpus: int) -> list[Arm]:
    """One prefill and one decode instance on so many GPUs or fewer, in every shape."""
    shapes = [(tp * pp, f"tp{tp}.pp{pp}") for tp, pp in FAMILIES[family].shapes]
    return [
        Arm(DISAGGREGATED, family, f"1p:{prefill},1d:{decode}", DISAGGREGATED_BUDGET)
        for (first, prefill), (second, decode) in product(shapes, shapes)
        if first + second <= num_gpus
    ]


def candidates(case: Case, way: str, kernels: str) -> list[Arm]:
    """Every shape of at most so many GPUs that holds the model; chunked, with every chunk.
    `kernels` ends the name of a family."""
    family = f"{case.model.name}-a100{kernels}"
    if way == DISAGGREGATED:
        return units(family, case.model.most_gpus)
    arm = replace(case.arm(way), family=family)
    budgets = CHUNKS if way == CHUNKED else (arm.budget,)
    return [
        replace(arm, layout=f"1m:tp{tp}.pp{pp}", budget=budget)
        for tp, pp in FAMILIES[family].shapes
        if tp * pp <= case.model.most_gpus
        for budget in budgets
    ]
