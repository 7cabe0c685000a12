"""One life of a server: its start, what it weighs, how fast it is when full, and the ladder.

The ladder is one list of rates for all. A server climbs it from about half of what it did with
many clients at once, until it misses the goal clearly; if its first rung is a miss it goes down.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.peers.contenders import MAX_MODEL_LEN, Contender
from bench.peers.processes import Running, running
from nodeserve.errors import NodeServeError
from nodeserve.loadgen.bench import Bench, BenchOptions, Result
from nodeserve.loadgen.fleet import Fleet
from nodeserve.loadgen.limits import parse_limits
from nodeserve.loadgen.records import Sample
from nodeserve.plan.goodput import GOAL, Tally
from nodeserve.plan.requests import Requests, Source

LADDER = (0.5, 1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 18, 20, 23, 26, 30, 35, 40)
COMMON_RATE = 4.0  # all are measured at it, for times that can be compared
LIMITS = ("ttft:500", "tpot:50")
SOURCE = Source("chat", divisor=8.0)
CLEARLY = 0.15  # below the goal: no higher rate is tried
TRIES = 2  # of a rung whose client was late
START_SHARE = 0.5  # of the rate in the closed loop with many clients
CUT_SHORT = "no time was left for more rates"
DRAIN_S = 10.0
CLOSED_DRAIN_S = 60.0  # for each request
ALONE, TOGETHER = 1, 16  # clients


@dataclass(frozen=True, slots=True)
class Protocol:
    """How much is measured in a life. `settle_s` of each rung are sent and not counted."""

    rung_s: float
    settle_s: float = 2.0
    num_alone: int = 8  # requests
    closed_s: float = 8.0  # the closed loop with many clients lasts about so long
    ladder: Sequence[float] = LADDER
    common_rate: float = COMMON_RATE
    source: Source = SOURCE
    limits: Sequence[str] = LIMITS
    max_late_s: float = 0.010
    life_s: float = math.inf  # after which no further rate is tried


@dataclass(slots=True)
class Life:
    """What was measured before it ended; `failure` says what cut it short."""

    start_s: float | None = None  # to the end of the first answer
    memory_mib: float | None = None
    alone: Result | None = None
    together: Result | None = None
    rungs: dict[float, Result] = field(default_factory=dict)
    failure: str | None = None


def live(
    contender: Contender, protocol: Protocol, folder: Path, say: Callable[[str], None]
) -> Life:
    """Start it, measure it, end it; what goes wrong with it is part of the result."""
    life = Life()
    try:
        with running(contender, folder) as server:
            asyncio.run(measure_life(life, server, protocol, say))
            if (code := server.process.poll()) is not None:
                life.failure = f"ended with {code} while it was measured"
    except NodeServeError as problem:
        life.failure = str(problem)
    return life


async def measure_life(
    life: Life, server: Running, protocol: Protocol, say: Callable[[str], None]
) -> None:
    until_s = time.perf_counter() + protocol.life_s
    async with Fleet(server.options) as fleet:
        await measure_closed(life, server, Asked(fleet, protocol), say)
    # Ours hears of the limits with each request; to peers these are headers that they do not know.
    slo_ms = parse_limits(protocol.limits).of_request()
    async with Fleet(replace(server.options, slo_ms=slo_ms)) as fleet:
        await measure_open(life, Asked(fleet, protocol), say, until_s)


class Asked:
    """A server's clients, and what they ask for."""

    def __init__(self, fleet: Fleet, protocol: Protocol) -> None:
        self.protocol = protocol
        self._fleet = fleet
        self._requests = Requests(protocol.source, min(MAX_MODEL_LEN, limit_of(fleet)))

    def bench(self, concurrency: int | None = None) -> Bench:
        """Runs with so many clients, or with an open loop."""
        return Bench(self._fleet, self._requests, options_of(self.protocol, concurrency))


async def measure_closed(
    life: Life, server: Running, asked: Asked, say: Callable[[str], None]
) -> None:
    first = check(await asked.bench(ALONE).run(None, 1))
    life.start_s = server.ready_s + first.samples[0].ended_s
    life.memory_mib = server.memory_mib()
    say(f"answers after {life.start_s:.1f} s, {life.memory_mib:.0f} MiB")
    life.alone = check(await asked.bench(ALONE).run(None, asked.protocol.num_alone))
    num = num_together(life.alone, asked.protocol)
    life.together = check(await asked.bench(TOGETHER).run(None, num))
    speed = tokens_per_s(life.together.samples)
    say(f"{tokens_per_s(life.alone.samples):.0f}, {speed:.0f} tokens/s with 1, 16 clients")


async def measure_open(
    life: Life, asked: Asked, say: Callable[[str], None], until_s: float
) -> None:
    protocol = asked.protocol

    async def probe(rate: float) -> Tally:
        num = math.ceil(rate * (protocol.rung_s + protocol.settle_s))
        for _ in range(TRIES):
            result = await asked.bench().run(rate, max(num, 8))
            valid = result.report.punctuality.valid
            if valid or time.perf_counter() > until_s:
                break
        life.rungs[rate] = result
        tally = result.report.tally
        note = "" if valid else f"; {', '.join(result.report.punctuality.reasons)}"
        say(f"{rate:g}/s: {tally.num_good} of {tally.num_offered} good{note}")
        return tally

    await probe(protocol.common_rate)
    assert life.together is not None
    done = {rate: one.report.tally for rate, one in life.rungs.items()}
    start = START_SHARE * life.together.report.requests_per_s
    if not await climb(probe, protocol.ladder, start, done, lambda: time.perf_counter() < until_s):
        life.failure = CUT_SHORT


async def climb(
    probe: Callable[[float], Awaitable[Tally]],
    ladder: Sequence[float],
    start: float,
    done: Mapping[float, Tally],
    go_on: Callable[[], bool] = lambda: True,
) -> bool:
    """Probe the rungs around the one where the goal is missed; `done` need not be probed again.

    Down from `start` to a rung that attains the goal, up from there until one is far below it or
    two in a row miss. False: `go_on` was false before that.
    """
    shares = {rate: tally.share for rate, tally in done.items()}
    place = max((place for place, rate in enumerate(ladder) if rate <= start), default=0)
    step, misses = 0, 0
    while go_on():
        rate = ladder[place]
        if rate not in shares:
            shares[rate] = (await probe(rate)).share
        missed = shares[rate] < GOAL
        if step <= 0:  # not yet on the way up
            step = -1 if missed and place > 0 else 1
            misses = 1 if missed and place == 0 else 0
        else:
            misses = misses + 1 if missed else 0
        ended = misses == 2 or (step > 0 and shares[rate] < GOAL - CLEARLY)
        if ended or place + step == len(ladder):
            return True
        place += step
    return False


def options_of(protocol: Protocol, concurrency: int | None) -> BenchOptions:
    return BenchOptions(
        limits=parse_limits(protocol.limits),
        settle_s=0.0 if concurrency else protocol.settle_s,
        drain_s=CLOSED_DRAIN_S if concurrency else DRAIN_S,
        max_late_s=protocol.max_late_s,
        concurrency=concurrency,
    )


def check(result: Result) -> Result:
    """A closed loop that was answered as a whole; raises what the first failure was otherwise."""
    for sample in result.samples:
        if sample.error is not None:
            why = sample.message or f"after {sample.ended_s - sample.sent_s:.0f} s"
            raise NodeServeError(f"a request failed with {sample.error}: {why}")
    return result


def limit_of(fleet: Fleet) -> int:
    return fleet.about.max_model_len or MAX_MODEL_LEN


def num_together(alone: Result, protocol: Protocol) -> int:
    """Requests for the closed loop with many clients: batches make servers two to five times as
    fast, so that it lasts about as long as it should."""
    expected = 3.0 * alone.report.requests_per_s * protocol.closed_s
    return max(2 * TOGETHER, min(500, round(expected)))


def tokens_per_s(samples: Sequence[Sample]) -> float:
    """Output tokens a second in a closed loop, from the first token until nothing is left to send:
    what comes later has ever fewer clients. An event's share of its answer counts for it."""
    events = sorted(
        (at_s, one.num_output_tokens / len(one.times)) for one in samples for at_s in one.times
    )
    began_s = events[0][0]
    ended_s = max(one.sent_s for one in samples)
    if ended_s <= began_s:  # all were sent at once
        ended_s = events[-1][0]
    within = math.fsum(weight for at_s, weight in events if began_s < at_s <= ended_s)
    return within / (ended_s - began_s) if ended_s > began_s else 0.0
