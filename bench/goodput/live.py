"""Live runs: a server for each, the same requests for all, one clock."""

import asyncio

from bench.goodput.arms import Arm, Duel
from bench.nodes import running
from nodeserve.loadgen.bench import Bench, BenchOptions, Result
from nodeserve.loadgen.blame import missed_by
from nodeserve.loadgen.fleet import Fleet
from nodeserve.loadgen.limits import limits_of
from nodeserve.loadgen.measure import counts
from nodeserve.loadgen.targets import TargetOptions
from nodeserve.plan.goodput import Slo
from nodeserve.plan.requests import Requests, Source

SECONDS = 30.0  # of arrivals that count
SETTLE_S = 5.0  # before them
LEAST_REQUESTS = 150
DRAIN_S = 60.0
TRIES = 3  # of a run whose client was late


class Late(Exception):
    """The client could not keep time: something else uses these cores."""


def run(duel: Duel, arm: Arm, source: Source, model: str | None) -> Result:
    """The arm's next rate, on a server of its own; its bracket has the result."""
    rate = arm.bracket.next_rate()
    assert rate is not None
    with running(duel.config(arm, model)) as socket:
        result = asyncio.run(_drive(str(socket), source, duel, rate))
    arm.bracket.add(rate, good_of(result, duel.slo))
    arm.reports[rate] = result.report
    return result


def good_of(result: Result, slo: Slo) -> list[bool]:
    """Which of the requests that count were good, in the order in which they were due."""
    counted = [one for one in result.samples if counts(one, SETTLE_S)]
    return [not missed_by(one, slo) for one in counted]


async def _drive(socket: str, source: Source, duel: Duel, rate: float) -> Result:
    options = BenchOptions(limits_of(duel.slo), settle_s=SETTLE_S, drain_s=DRAIN_S)
    num = max(LEAST_REQUESTS, round(SECONDS * rate)) + round(SETTLE_S * rate)
    async with Fleet(TargetOptions(socket=socket)) as fleet:
        requests = Requests(source, fleet.about.max_model_len)
        bench = Bench(fleet, requests, options)
        await bench.prepare()
        for _ in range(TRIES):
            result = await bench.run(rate, num)
            if result.report.punctuality.valid:
                return result
    raise Late("; ".join(result.report.punctuality.reasons))
