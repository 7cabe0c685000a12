"""All runs of a plan, spread over processes; results in the plan's order whoever ends first."""

import contextlib
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from bench.window.compare import Compared, compare
from bench.window.grid import (
    ARMS,
    BY_LETTER,
    MEAN_LIMIT_S,
    P99_LIMIT_S,
    WORKLOAD,
    Plan,
    Point,
    Shape,
)
from bench.window.runs import Run, Saturation, saturation, serve, trace
from bench.window.search import limits

T = TypeVar("T")
R = TypeVar("R")
Rates = dict[str, dict[str, list[tuple[float, float]]]]  # by shape and arm, for each seed


class _Overload(NamedTuple):
    shape: Shape
    lengths: str
    seeds: tuple[int, ...]
    num_requests: int


class _Visit(NamedTuple):
    """One seed at one point: all arms serve the same requests."""

    point: Point
    qps: float
    seed: int
    num_requests: int


class _Search(NamedTuple):
    """One seed of one arm: the highest rates under the limits."""

    shape: Shape
    arm: str
    saturation_qps: float
    seed: int
    num_requests: int


class Campaign:
    """`jobs` processes; with one, this one does the work."""

    def __init__(self, plan: Plan, jobs: int) -> None:
        self.plan = plan
        self._jobs = jobs
        self._saturations: dict[tuple[Shape, str], Saturation] = {}

    def saturate(self) -> dict[tuple[Shape, str], Saturation]:
        """For each shape and lengths of the plan, the unit of loads."""
        plan = self.plan
        keys = [(point.shape, point.lengths) for point in plan.points]
        keys += [(shape, WORKLOAD[1]) for shape in plan.limit_shapes]
        keys = list(dict.fromkeys(keys))
        tasks = [_Overload(*key, plan.seeds, plan.num_requests(key[0])) for key in keys]
        found = self._each(_overload, tasks, "saturation")
        self._saturations = dict(zip(keys, found, strict=True))
        return self._saturations

    def compare(self) -> list[Compared]:
        """Every point of the plan."""
        plan = self.plan
        rates = {
            point: point.load * self._saturations[point.shape, point.lengths].qps
            for point in plan.points
        }
        tasks = [
            _Visit(point, qps, seed, plan.num_requests(point.shape))
            for point, qps in rates.items()
            for seed in plan.seeds
        ]
        visits = self._each(_visit, tasks, "points")
        compared = []
        for point, qps in rates.items():
            seeds = [next(visits) for _ in plan.seeds]
            runs = {arm.letter: [visit[arm.letter] for visit in seeds] for arm in ARMS}
            compared.append(compare(point, qps, runs))
        return compared

    def rates(self) -> Rates:
        """The highest rates that meet the limits of mean and P99 TTFT."""
        plan = self.plan
        tasks = [
            _Search(shape, arm, found.qps, seed, plan.num_requests(shape))
            for (shape, lengths), found in self._saturations.items()
            if shape in plan.limit_shapes and lengths == WORKLOAD[1]
            for arm in plan.limit_arms
            for seed in plan.seeds
        ]
        rates: Rates = {}
        for task, rate in zip(tasks, self._each(_search, tasks, "limits"), strict=True):
            rates.setdefault(str(task.shape), {}).setdefault(task.arm, []).append(rate)
        return rates

    def _each(self, function: Callable[[T], R], tasks: Sequence[T], name: str) -> Iterator[R]:
        """The results in the order of the tasks; says how far it is ten times."""
        with contextlib.ExitStack() as stack:
            results: Iterator[R] = map(function, tasks)
            if self._jobs > 1:
                pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(self._jobs))
                results = pool.imap(function, tasks)
            for number, result in enumerate(results, 1):
                if number * 10 // len(tasks) > (number - 1) * 10 // len(tasks) and self.plan.talks:
                    print(f"{name}: {number} of {len(tasks)}", file=sys.stderr, flush=True)
                yield result


def _overload(task: _Overload) -> Saturation:
    return saturation(*task)


def _visit(task: _Visit) -> dict[str, Run]:
    point = task.point
    requests = trace(point.arrivals, point.lengths, task.qps, task.seed, task.num_requests)
    return {arm.letter: serve(arm, point.shape, requests, task.seed) for arm in ARMS}


def _search(task: _Search) -> tuple[float, float]:
    def measure(load: float) -> tuple[float, float]:
        requests = trace(*WORKLOAD, load * task.saturation_qps, task.seed, task.num_requests)
        run = serve(BY_LETTER[task.arm], task.shape, requests, task.seed)
        return run.measures["mean_s"], run.measures["p99_s"]

    loads = limits(measure, MEAN_LIMIT_S, P99_LIMIT_S)
    return round(loads.mean * task.saturation_qps, 3), round(loads.p99 * task.saturation_qps, 3)
