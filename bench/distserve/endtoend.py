"""The end-to-end table: rate and SLO scale of each system in each case."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

from bench.distserve.cases import CHUNKED, DISAGGREGATED, PREFILL_FIRST, Arm, Case
from bench.distserve.runs import Load, Protocol
from bench.distserve.tasks import (
    Ask,
    Pool,
    Sought,
    candidates,
    race,
    scale_at,
    seek,
    share_at,
)

WAYS = (DISAGGREGATED, PREFILL_FIRST, CHUNKED)
SEARCHED = (PREFILL_FIRST, CHUNKED)
SAME = "same kernels"
KERNELS = {"baseline's kernels": "-vllm", SAME: ""}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is run. `steady` is a long run whose start does not count."""

    seeds: tuple[int, ...]
    steady: Protocol | None
    searches: bool = True
    curves: bool = True

    def paper(self, case: Case) -> Protocol:
        """The paper's: so few requests that queues hardly settle."""
        return Protocol(self.seeds, case.requests_per_gpu)


@dataclass(slots=True)
class Result:
    """What was found in one case, by way; searched ones by kernels and way."""

    case: Case
    rates: dict[str, float] = field(default_factory=dict)
    scales: dict[str, float | None] = field(default_factory=dict)
    searched: dict[tuple[str, str], Sought] = field(default_factory=dict)
    searched_scales: dict[tuple[str, str], float | None] = field(default_factory=dict)
    steady: dict[str, float] = field(default_factory=dict)
    steady_searched: dict[tuple[str, str], float] = field(default_factory=dict)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


def run(cases: Sequence[Case], plan: Plan, pool: Pool) -> list[Result]:
    """All cases, each kind of question at once for all of them."""
    results = [Result(case) for case in cases]
    fixed = [(result, way) for result in results for way in WAYS]
    asks = [_ask(result.case, result.case.arm(way), plan) for result, way in fixed]
    for (result, way), found in zip(fixed, pool.each(seek, asks, "rates"), strict=True):
        result.rates[way] = found.rate
    asked = [(ask, result.case.scale_rate) for ask, (result, _) in zip(asks, fixed, strict=True)]
    for (result, way), scale in zip(fixed, pool.each(scale_at, asked, "scales"), strict=True):
        result.scales[way] = scale
    if plan.searches:
        _search(results, plan, pool)
    if plan.steady is not None:
        _steady(results, plan, pool)
    if plan.curves:
        points = [
            (ask, rate)
            for ask, (result, _) in zip(asks, fixed, strict=True)
            for rate, *_ in result.case.curve
        ]
        shares = pool.each(share_at, points, "curves")
        for result, way in fixed:
            result.curves[way] = [(rate, next(shares)) for rate, *_ in result.case.curve]
    return results


def _ask(case: Case, arm: Arm, plan: Plan, protocol: Protocol | None = None) -> Ask:
    start = case.paper.rates[0] / (1 if arm.way == DISAGGREGATED else 2)
    return Ask(Load(arm, case.lengths, protocol or plan.paper(case)), case.limits, start)


def _search(results: Sequence[Result], plan: Plan, pool: Pool) -> None:
    """The disaggregated system in its best shape; each baseline in its, with its own kernels and
    with the same: what is left then is disaggregation alone. Shapes are raced with all seeds: with
    so few requests as one has, chance would choose."""
    searched = [(SAME, DISAGGREGATED), *product(KERNELS, SEARCHED)]
    groups = [(result, *one) for result in results for one in searched]
    races = [
        [_ask(result.case, arm, plan) for arm in candidates(result.case, way, KERNELS[kernels])]
        for result, kernels, way in groups
    ]
    won = list(pool.each(race, races, "every shape"))
    asked = [
        (_ask(result.case, best.arm, plan), result.case.scale_rate)
        for (result, _, _), best in zip(groups, won, strict=True)
    ]
    scales = pool.each(scale_at, asked, "the scales of the best")
    for (result, kernels, way), best in zip(groups, won, strict=True):
        result.searched[kernels, way] = best
        result.searched_scales[kernels, way] = next(scales)


def _steady(results: Sequence[Result], plan: Plan, pool: Pool) -> None:
    """The paper's shapes, and the best ones with the disaggregated system's kernels."""
    asks = []
    for result in results:
        arms = [result.case.arm(way) for way in WAYS]
        arms += [result.searched[key].arm for key in _same_kernels(result)]
        asks += [_ask(result.case, arm, plan, plan.steady) for arm in arms]
    found = pool.each(seek, asks, "steady rates")
    for result in results:
        result.steady = {way: next(found).rate for way in WAYS}
        result.steady_searched = {key: next(found).rate for key in _same_kernels(result)}


def _same_kernels(result: Result) -> list[tuple[str, str]]:
    return [key for key in result.searched if not KERNELS[key[0]]]
