"""Runs that are asked for together, spread over processes; each is a function and its arguments."""

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple, TypeVar

from bench.distserve.cases import CHUNKED, CHUNKS, DISAGGREGATED, Arm, Case
from bench.distserve.runs import Limits, Protocol, attained, counted, highest_rate, smallest_scale
from nodeserve.policy.profiles import FAMILIES

T = TypeVar("T")
R = TypeVar("R")


class Ask(NamedTuple):
    """An arm, the requests that it gets, and the limits that they have."""

    arm: Arm
    lengths: str
    limits: Limits
    protocol: Protocol
    start: float  # rate a GPU at which a search begins


class Sought(NamedTuple):
    arm: Arm
    rate: float  # requests a second and GPU
    cpu_s: float


class Pool:
    """`jobs` processes; with one, this one does the work."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs

    def each(self, function: Callable[[T], R], tasks: Sequence[T], name: str) -> Iterator[R]:
        """The results in the order of the tasks; says what it does."""
        print(f"{name}: {len(tasks)} tasks", file=sys.stderr, flush=True)
        with ExitStack() as stack:
            results: Iterator[R] = map(function, tasks)
            if self.jobs > 1:
                pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(self.jobs))
                results = pool.imap(function, tasks)
            yield from results


def seek(ask: Ask) -> Sought:
    """The highest rate that attains the goal."""
    began_s = time.process_time()

    def share(gpu_rate: float) -> float:
        return attained(counted(ask.arm, ask.lengths, gpu_rate, ask.protocol), ask.limits)

    rate = highest_rate(share, ask.start)
    return Sought(ask.arm, rate, time.process_time() - began_s)


def share_at(asked: tuple[Ask, float]) -> float:
    """What is attained at one rate."""
    ask, rate = asked
    return attained(counted(ask.arm, ask.lengths, rate, ask.protocol), ask.limits)


def scale_at(asked: tuple[Ask, float]) -> float:
    """The smallest scale of the limits at one rate."""
    ask, rate = asked
    return smallest_scale(counted(ask.arm, ask.lengths, rate, ask.protocol), ask.limits)


def limits_of(case: Case) -> Limits:
    return Limits(case.ttft_s, case.tpot_s)


def candidates(case: Case, way: str, family: str) -> list[Arm]:
    """Every shape of at most so many GPUs that holds the model; chunked, with every chunk."""
    assert way != DISAGGREGATED
    arm = replace(case.arm(way), family=family)
    budgets = CHUNKS if way == CHUNKED else (arm.budget,)
    return [
        replace(arm, layout=f"1m:tp{tp}.pp{pp}", budget=budget)
        for tp, pp in FAMILIES[family].shapes
        if tp * pp <= case.most_gpus
        for budget in budgets
    ]


def best(found: Sequence[Sought]) -> Sought:
    """The highest rate a GPU; of equal ones the fewest GPUs."""
    return max(found, key=lambda one: (one.rate, -one.arm.num_gpus))
