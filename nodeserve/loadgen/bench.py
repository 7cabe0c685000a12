"""Runs against one server: a rate, several, or the search for the highest that is good enough."""

import asyncio
import math
import statistics
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nodeserve.errors import NodeServeError, from_code
from nodeserve.loadgen.blame import missed_by
from nodeserve.loadgen.fleet import DRAIN_S, Fleet, Watcher
from nodeserve.loadgen.limits import Limits
from nodeserve.loadgen.measure import MAX_LATE_S, Report, counts, measure
from nodeserve.loadgen.records import Sample, Unloaded
from nodeserve.plan.goodput import CONFIDENCE, GOAL, Slo, Tally
from nodeserve.plan.records import Arrival
from nodeserve.plan.requests import Requests
from nodeserve.plan.search import Found, Probe, SearchOptions, find_goodput

UNLOADED_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)  # of the prompts' lengths, each asked alone
UNLOADED_ROUNDS = 3
UNLOADED_OUTPUT = 32  # tokens at most
UNLOADED_AMONG = 500  # requests, whose lengths are the workload's
WARM_UP_OUTPUT = 16


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """How runs are made and judged. `settle_s`: requests due before it are sent and not counted."""

    limits: Limits
    goal: float = GOAL
    confidence: float = CONFIDENCE
    settle_s: float = 0.0
    drain_s: float = DRAIN_S
    max_late_s: float = MAX_LATE_S
    concurrency: int | None = None  # None: open loop
    num_warm_ups: int = 2
    forced: bool = True  # lengths of outputs: shorter ones are misses


class Result(NamedTuple):
    """One run. `rate` is None for a closed loop and for a trace at its own times. `given_up`: it
    was ended early, since it could not attain the goal any more."""

    rate: float | None
    arrivals: list[Arrival]
    report: Report
    samples: list[Sample]
    given_up: bool = False


class Live(Watcher):
    """A run while it goes on: who ended, who was good. Ends the run early, if it may, when even
    with all the rest good the share would be below the goal for sure; as in the report, requests
    due before the settling time do not count there."""

    def __init__(
        self,
        bench: "Bench",
        rate: float | None,
        arrivals: list[Arrival],
        end_early: float | None,
    ):
        self.rate = rate
        self.num_requests = len(arrivals)
        self.num_ended = 0
        self.num_good = 0
        self.began_s = math.inf
        self.ended_early = False
        self._bench = bench
        self._times = [one.arrived_s for one in arrivals]
        self._end_early = end_early
        self._num_counted = sum(time_s >= bench.options.settle_s for time_s in self._times)
        self._num_judged = self._num_well = 0  # of those

    def began(self, num_requests: int, began_s: float) -> None:
        self.began_s = began_s
        self._bench.on_news(self)

    def ended(self, samples: Sequence[Sample]) -> None:
        slo_of, options = self._bench.slo_of, self._bench.options
        good = [not missed_by(one, slo_of(one.job.arrival), options.forced) for one in samples]
        self.num_ended += len(samples)
        self.num_good += sum(good)
        judged = [
            well for one, well in zip(samples, good, strict=True) if counts(one, options.settle_s)
        ]
        self._num_judged += len(judged)
        self._num_well += sum(judged)
        self._bench.on_news(self)

    def num_due(self, now_s: float) -> int:
        """Requests whose time has come."""
        return bisect_right(self._times, now_s - self.began_s)

    def give_up(self) -> bool:
        options = self._bench.options
        num_left = self._num_counted - self._num_judged
        tally = Tally(self._num_judged, self._num_well, num_left)
        goal, sure = options.goal, self._end_early
        hopeless = sure is not None and tally.interval(sure)[1] < goal
        self.ended_early = hopeless and self.num_ended < self.num_requests
        return self.ended_early


class Bench:
    """`on_news` is called with the state of a run whenever it changes."""

    def __init__(
        self,
        fleet: Fleet,
        requests: Requests,
        options: BenchOptions,
        on_news: Callable[[Live], None] = lambda live: None,
    ) -> None:
        self.options = options
        self.on_news = on_news
        self.unloaded: Unloaded | None = None
        self._fleet = fleet
        self._requests = requests

    def slo_of(self, arrival: Arrival) -> Slo:
        return self.options.limits.slo(arrival, self.unloaded)

    async def prepare(self) -> None:
        """Warm the server up; measure it unloaded where limits are multiples of that."""
        if self.options.num_warm_ups:
            arrivals = self._requests.some(self.options.num_warm_ups)
            await self._alone([shortened(one, WARM_UP_OUTPUT) for one in arrivals])
        if self.options.limits.relative:
            self.unloaded = await self.measure_unloaded()

    async def measure_unloaded(self) -> Unloaded:
        """Times of single requests with the lengths of this workload, one after the other."""
        rows = sorted(self._requests.some(UNLOADED_AMONG), key=lambda one: one.num_prompt_tokens)
        chosen = {
            one.num_prompt_tokens: shortened(one, UNLOADED_OUTPUT, 2)
            for one in (rows[int(level * (len(rows) - 1))] for level in UNLOADED_LEVELS)
        }
        samples = await self._alone(list(chosen.values()) * UNLOADED_ROUNDS)
        points = []
        for num_tokens in sorted(chosen):
            times = [
                one.ttft_s
                for one in samples
                if one.job.arrival.num_prompt_tokens == num_tokens and one.ttft_s is not None
            ]
            points.append((num_tokens, statistics.median(times)))
        tpots = [one.tpot_s for one in samples if one.tpot_s is not None]
        return Unloaded(tuple(points), statistics.median(tpots) if tpots else 0.0)

    async def run(self, rate: float | None, num: int, end_early: float | None = None) -> Result:
        """One run of the first `num` requests; with `concurrency` as a closed loop. It ends early
        once it misses the goal with the confidence `end_early`."""
        closed = self.options.concurrency is not None
        arrivals = self._requests.some(num) if closed else self._requests.first(num, rate)
        live = Live(self, None if closed else rate, arrivals, end_early)
        seen = await self._fleet.run(
            arrivals,
            concurrency=self.options.concurrency,
            drain_s=self.options.drain_s,
            watcher=live,
        )
        options = self.options
        report = measure(
            seen.samples,
            self.slo_of,
            options.goal,
            seen.lags_s,
            options.settle_s,
            options.max_late_s,
            options.forced,
        )
        if report is None:
            raise NodeServeError(
                f"no request of the run is due after the first {options.settle_s:g} s: send more"
                " (--requests, --duration) or settle for less (--settle)"
            )
        samples = sorted(seen.samples, key=lambda one: one.job.number)
        return Result(live.rate, arrivals, report, samples, live.ended_early)

    async def search(
        self,
        options: SearchOptions,
        on_result: Callable[[Result], Any] = lambda result: None,
    ) -> Found:
        """The goodput; requests of the settling time come on top of those that a probe has."""
        loop = asyncio.get_running_loop()

        async def one(rate: float, num: int) -> Probe:
            num += math.ceil(rate * self.options.settle_s)
            result = await self.run(rate, num, end_early=options.look_confidence)
            on_result(result)
            return Probe(rate, result.report.tally, result.report.punctuality.valid)

        def ask(rate: float, num: int) -> Probe:
            return asyncio.run_coroutine_threadsafe(one(rate, num), loop).result()

        return await asyncio.to_thread(find_goodput, ask, options)

    async def _alone(self, arrivals: list[Arrival]) -> list[Sample]:
        """One request after the other; raises what the first that failed did with."""
        seen = await self._fleet.run(arrivals, concurrency=1, drain_s=self.options.drain_s)
        for sample in seen.samples:
            if sample.error is not None:
                raise from_code(sample.error, f"a single request failed: {sample.message}")
        return seen.samples


def shortened(arrival: Arrival, most: int, least: int = 1) -> Arrival:
    """The request with `most` output tokens at most, `least` at least."""
    num_output = max(least, min(arrival.num_output_tokens, most))
    return arrival._replace(num_output_tokens=num_output)
