"""Live runs: a server for each, the same requests for all, one clock."""

import asyncio
import sys

from bench.goodput.arms import Arm, Duel
from bench.goodput.twin import twin_of
from bench.nodes import running
from bench.others import foreign_share, spent
from nodeserve.loadgen.bench import Bench, BenchOptions, Result
from nodeserve.loadgen.blame import missed_by
from nodeserve.loadgen.fleet import Fleet
from nodeserve.loadgen.limits import limits_of
from nodeserve.loadgen.measure import counts
from nodeserve.loadgen.targets import TargetOptions
from nodeserve.plan.goodput import Slo
from nodeserve.plan.requests import Requests, Source

SECONDS = 40.0  # of arrivals that count
SETTLE_S = 5.0  # before them
LEAST_REQUESTS = 150
DRAIN_S = 60.0
TRIES = 3  # of a run whose client was late, or that others disturbed
DISTURBED = 0.03  # of the machine's cores that others had


class Late(Exception):
    """The client could not keep time: something else uses these cores."""


def run(duel: Duel, arm: Arm, source: Source, model: str | None) -> Result:
    """The arm's next rate, on a server of its own; its bracket has the result. Late if the client
    was late each time."""
    rate = arm.bracket.next_rate()
    assert rate is not None
    with running(duel.config(arm, model)) as socket:
        result, foreign = asyncio.run(_drive(str(socket), source, duel, rate))
    twin = twin_of(duel.question, arm.predicted.candidate, rate, result.arrivals, SETTLE_S)
    arm.bracket.add(rate, good_of(result, duel.slo), twin)
    arm.reports[rate] = result.report
    arm.foreign = max(arm.foreign, foreign)
    return result


def good_of(result: Result, slo: Slo) -> list[bool]:
    """Which of the requests that count were good, in the order in which they were due."""
    counted = [one for one in result.samples if counts(one, SETTLE_S)]
    return [not missed_by(one, slo) for one in counted]


async def _drive(socket: str, source: Source, duel: Duel, rate: float) -> tuple[Result, float]:
    """The least disturbed of a few runs, and the share of the cores that others had meanwhile."""
    options = BenchOptions(limits_of(duel.slo), settle_s=SETTLE_S, drain_s=DRAIN_S)
    num = max(LEAST_REQUESTS, round(SECONDS * rate)) + round(SETTLE_S * rate)
    in_time: list[tuple[float, Result]] = []
    async with Fleet(TargetOptions(socket=socket)) as fleet:
        requests = Requests(source, fleet.about.max_model_len)
        bench = Bench(fleet, requests, options)
        await bench.prepare()
        for _ in range(TRIES):
            before = spent()
            result = await bench.run(rate, num)
            foreign = foreign_share(before, spent())
            if result.report.punctuality.valid:
                in_time.append((foreign, result))
                if foreign <= DISTURBED:
                    break
            print(f"    again: others had {foreign:.1%} of the cores", file=sys.stderr, flush=True)
    if not in_time:
        raise Late("; ".join(result.report.punctuality.reasons))
    foreign, result = min(in_time, key=lambda one: one[0])
    return result, foreign
