"""More than a node can serve, for long: who comes in is served in time, the rest is told at once.

    python -m bench.overload [--seconds N] [--times X] [--capacity RATE] [--smoke]

A node of simulated GPUs: passes take the time that a profile says, everything else is the engine.
First its goodput is searched for as `nodeserve bench --find-goodput` does, then it is offered a
multiple of that, open loop, and one second after that the goodput again. What is shown of the
coordinator (memory, descriptors, processor time) is what the kernel says of its process. The last
line is JSON.
"""

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.nodes import running
from bench.overload.phases import Figures, Phase, Span, figures, schedule
from bench.overload.tables import HEAD, aims, row, values
from bench.report import emit, machine, save
from bench.watch import Look, watched
from nodeserve import AsyncClient
from nodeserve.config import EngineConfig
from nodeserve.errors import NodeServeError
from nodeserve.loadgen.bench import Bench, BenchOptions, Result
from nodeserve.loadgen.fleet import Fleet, Watcher
from nodeserve.loadgen.limits import limits_of
from nodeserve.loadgen.measure import Punctuality, punctuality
from nodeserve.loadgen.records import Sample
from nodeserve.loadgen.targets import TargetOptions
from nodeserve.plan.goodput import GOAL, Slo
from nodeserve.plan.requests import Requests, Source
from nodeserve.plan.search import SearchOptions

RESULTS = Path(__file__).parents[1] / "results" / "overload.json"
SLO = Slo(0.5, 0.05)
START_RATE = 60.0  # of the search, requests a second
PROBE_S, SETTLE_S = 6.0, 3.0  # of each probe what counts, and what comes before
CALM_S = 20.0  # at the capacity, before and after
AGAIN_S = 1.0  # after the overload, service is to be as before
DRAIN_S = 30.0


class Run:
    """A fleet against a node, one run after the other."""

    def __init__(self, fleet: Fleet, requests: Requests, pid: int) -> None:
        self.fleet = fleet
        self.requests = requests
        self.pid = pid

    async def capacity(self) -> float:
        """The goodput, in requests a second."""
        options = BenchOptions(limits_of(SLO), settle_s=SETTLE_S, drain_s=DRAIN_S)
        bench = Bench(self.fleet, self.requests, options)
        search = SearchOptions(
            START_RATE,
            tolerance=0.08,
            min_requests=300,
            min_duration_s=PROBE_S,
            max_requests=600,
            max_probes=12,
        )
        found = await bench.search(search, _told)
        if found.reason == "invalid" or not found.rate:
            raise NodeServeError(f"no goodput was found ({found.reason}): is the machine busy?")
        return found.rate

    async def phases(
        self, phases: Sequence[Phase]
    ) -> tuple[list[Sample], list[Span], list[Look], Punctuality]:
        """One run: what became of its requests, when each phase was, looks at the coordinator by
        the run's time, and how late requests were sent."""
        arrivals, spans = schedule(self.requests, phases)
        start = Start()
        async with watched(self.pid) as looks:
            seen = await self.fleet.run(arrivals, drain_s=DRAIN_S, watcher=start)
        timed = [one._replace(at_s=one.at_s - start.began_s) for one in looks]
        late = punctuality(seen.samples, seen.lags_s)
        return seen.samples, spans, [one for one in timed if one.at_s >= 0.0], late


class Start(Watcher):
    """Remembers when a run began: its payloads are made before that."""

    began_s = 0.0

    def began(self, num_requests: int, began_s: float) -> None:
        self.began_s = began_s


def _told(result: Result) -> None:
    tally = result.report.tally
    print(
        f"    {result.rate:.1f}/s: {tally.num_good} of {tally.num_offered} in time",
        file=sys.stderr,
        flush=True,
    )


async def measure(socket: str, args: argparse.Namespace) -> dict[str, object]:
    """Search, calm, overload, calm again; prints as it goes."""
    slo_ms = {"ttft_ms": 1e3 * (SLO.ttft_s or 0.0), "tpot_ms": 1e3 * (SLO.tpot_s or 0.0)}
    async with AsyncClient(socket) as client:
        pid = int((await client.server())["pid"])
    options = TargetOptions(socket=socket, slo_ms=slo_ms)
    async with Fleet(options, args.processes) as fleet:
        run = Run(fleet, Requests(Source(args.workload), fleet.about.max_model_len), pid)
        rate = args.capacity or await run.capacity()
        print(f"ceiling: the goodput at that load is {rate:.1f} requests/s, {GOAL:.0%} in time")
        print(f"\n{HEAD}", flush=True)
        samples, spans, _, late_before = await run.phases([Phase("capacity", rate, args.calm)])
        found = [figures(spans[0], samples, SLO, min(SETTLE_S, args.calm / 4))]
        print(row(found[0]), flush=True)
        flood = Phase(f"{args.times:g} times", args.times * rate, args.seconds)
        after = Phase("a second later", rate, args.calm, AGAIN_S)
        samples, spans, looks, late = await run.phases([flood, after])
        found += [figures(span, samples, SLO) for span in spans]
        print("\n".join(map(row, found[1:])), flush=True)
    return report(rate, found, looks, (late_before, late), spans[0])


def report(
    rate: float,
    found: Sequence[Figures],
    looks: Sequence[Look],
    late: Sequence[Punctuality],
    flood: Span,
) -> dict[str, object]:
    """Aims met or missed, and all numbers."""
    verdicts = aims(found, looks, late, flood)
    print("", *(f"{'met' if met else 'MISSED':7} {text}" for text, met in verdicts), sep="\n")
    return {
        "capacity_per_s": round(rate, 2),
        "phases": [values(one) for one in found],
        "looks": [
            {"at_s": round(one.at_s, 1), "rss_mib": round(one.rss_bytes / 2**20, 2)}
            for one in looks
        ],
        "aims": [{"aim": text, "met": met} for text, met in verdicts],
    }


def main() -> None:
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through what ends the server
    began_s = time.perf_counter()
    config = EngineConfig(layout=args.layout, device="sim", profile=args.profile)
    print(f"{args.layout} of {args.profile}, {args.workload}, {args.processes} client processes")
    print(f"limits: first token {SLO.ttft_s} s, {SLO.tpot_s} s a token; {machine()}", flush=True)
    with running(config) as socket:
        result = asyncio.run(measure(str(socket), args))
    named = {
        "bench": "overload",
        "layout": args.layout,
        "profile": args.profile,
        "workload": args.workload,
        "times": args.times,
        "seconds": args.seconds,
        **result,
        "wall_s": round(time.perf_counter() - began_s, 1),
    }
    if args.out is not None:
        save(args.out, named)
    emit(named)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layout", default="2p2d")
    parser.add_argument("--profile", default="llama-3.1-8b-h100")
    parser.add_argument("--workload", default="synthetic(lognormal:600,120)")
    parser.add_argument("--seconds", type=float, default=120.0, help="of overload")
    parser.add_argument("--times", type=float, default=20.0, help="the capacity")
    parser.add_argument("--calm", type=float, default=CALM_S, help="seconds before and after")
    parser.add_argument("--capacity", type=float, metavar="RATE", help="known: no search")
    parser.add_argument("--processes", type=int, default=min(4, len(os.sched_getaffinity(0))))
    parser.add_argument("--smoke", action="store_true", help="a tiny run: does it work?")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the result there")
    args = parser.parse_args()
    if args.smoke:
        args.seconds, args.times, args.calm, args.capacity = 1.0, 5.0, 1.0, 60.0
    return args


if __name__ == "__main__":
    main()
