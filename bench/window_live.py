"""The staggered window on real processes: who waits where, and whether the simulator knew it.

    python -m bench.window_live [--requests N] [--load SHARE]

Starts `nodeserve start --device sim` once for each arm, replays one trace of prompts with one
output token each, and puts the stages of the time to first token beside those that the simulator
predicts for the same trace. Passes take as long as a profile says, in real time; all else is the
engine: socket, coordinator, rings, worker processes in lockstep. The last line is JSON.
"""

import argparse
import asyncio
import math
import time
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.nodes import running
from bench.report import emit
from bench.window.aims import SMALL_DEVICE_WAIT
from bench.window.grid import BY_LETTER, PROFILE, SEEDS, WORKLOAD, Arm, Shape
from bench.window.runs import Run, saturation, serve, trace
from bench.window.stats import p99
from nodeserve.config import EngineConfig
from nodeserve.loadgen.fleet import Fleet
from nodeserve.loadgen.records import Sample
from nodeserve.loadgen.targets import TargetOptions
from nodeserve.plan.records import Arrival, Served
from nodeserve.plan.summary import STAGES, kept

SHAPE = Shape(4, 2)
LETTERS = "ACDG"
SEED = SEEDS[0]
AGREE = 0.10  # of the simulator's mean TTFT
APART = 0.05  # arms that differ by less may come in any order
DRAIN_S = 30.0


class Found(NamedTuple):
    """One arm: means in seconds of the requests that count, live and predicted."""

    live: dict[str, float]
    predicted: dict[str, float]
    num_failed: int
    late_s: float  # the latest that a request was sent behind its time
    client_s: float  # mean TTFT by the client's clock, from handing over to the first token

    @property
    def ratio(self) -> float:
        return self.live["mean_s"] / self.predicted["mean_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=300, metavar="N", help="of each arm")
    parser.add_argument("--load", type=float, default=0.6, metavar="SHARE", help="of C's most")
    args = parser.parse_args()
    if args.requests < 1 or not 0 < args.load < math.inf:
        parser.error("--requests needs at least 1, --load a number above 0")
    began = time.perf_counter()
    qps = args.load * saturation(SHAPE, WORKLOAD[1], SEEDS, args.requests).qps
    requests = trace(*WORKLOAD, qps, SEED, args.requests)
    print(f"{SHAPE.layout} of {PROFILE.name}, {args.requests} requests at {qps:.1f} QPS")
    print(f"({args.load:.0%} load, {', '.join(WORKLOAD)} tokens); means in ms, P99 in brackets")
    print(f"\n{'':35}{'scheduler  transit   device  prefill   return':>45}{'TTFT':>13}")
    found = {}
    for letter in LETTERS:
        arm = BY_LETTER[letter]
        found[letter] = measure(arm, requests)
        print(rows(arm, found[letter]), flush=True)
    verdicts = check(found)
    print("", *(f"{'met' if met else 'MISSED':7} {text}" for text, met in verdicts), sep="\n")
    wall_s = time.perf_counter() - began
    emit(
        {
            "bench": "window-live",
            "layout": SHAPE.layout,
            "requests": args.requests,
            "qps": round(qps, 2),
            "arms": {letter: rounded(one) for letter, one in found.items()},
            "aims": [{"aim": text, "met": met} for text, met in verdicts],
            "wall_s": round(wall_s, 1),
        }
    )


def measure(arm: Arm, requests: Sequence[Arrival]) -> Found:
    """One node's life, and what the simulator says of the same trace."""
    config = EngineConfig(
        layout=SHAPE.layout,
        device="sim",
        profile=PROFILE.name,
        admission=arm.admission,
        seed=SEED,
    )
    with running(config) as socket:
        answered = asyncio.run(drive(socket, requests))
    # One run of either depends on the noise of its passes; that of simulations can be averaged out.
    return compared(answered, [serve(arm, SHAPE, requests, seed) for seed in SEEDS])


async def drive(socket: Path, requests: Sequence[Arrival]) -> list[Sample]:
    """Replay a trace."""
    async with Fleet(TargetOptions(socket=str(socket))) as fleet:
        seen = await fleet.run(requests, drain_s=DRAIN_S)
    return sorted(seen.samples, key=lambda one: one.job.number)


def compared(answered: Sequence[Sample], simulated: Sequence[Run]) -> Found:
    """Live means over the same requests that count in a simulation."""
    served = [
        Served(one.job.arrival, one.timings, 0.0, "length", None) for one in answered if one.timings
    ]
    timings = [one.timings for one in kept(served)]
    ttft_s = np.array([one.ttft_s for one in timings], dtype=np.float32)
    stages = {stage: float(np.mean([getattr(one, stage) for one in timings])) for stage in STAGES}
    return Found(
        {"mean_s": float(ttft_s.mean()), "p99_s": p99(ttft_s), **stages},
        {
            name: float(np.mean([run.measures[name] for run in simulated]))
            for name in ("mean_s", "p99_s", *STAGES)
        },
        sum(one.error is not None for one in answered),
        max(one.late_s for one in answered),
        float(np.mean([one.ttft_s for one in answered if one.ttft_s is not None])),
    )


def check(found: dict[str, Found]) -> list[tuple[str, bool]]:
    """The window's signature, and whether simulation and reality say the same."""
    shares = {arm: one.live["device_wait_s"] / one.live["mean_s"] for arm, one in found.items()}
    worst = max(found, key=lambda arm: abs(found[arm].ratio - 1))
    order = sorted(found, key=lambda arm: found[arm].live["mean_s"])
    swapped = [f"{a}{b}" for a, b in permutations(found, 2) if swaps(found[a], found[b])]
    failed = sum(one.num_failed for one in found.values())
    return [
        (
            f"device wait of G at most {SMALL_DEVICE_WAIT:.0%} of its TTFT: {shares['G']:.1%}"
            f" (C: {shares['C']:.0%})",
            shares["G"] <= SMALL_DEVICE_WAIT,
        ),
        (
            f"G before every arm that dispatches on arrival: {' '.join(order)} by mean TTFT",
            order.index("G") < min(order.index("A"), order.index("C")),
        ),
        (
            f"the same order as simulated, of arms {APART:.0%} apart there:"
            f" {', '.join(swapped) or 'none'} swapped",
            not swapped,
        ),
        (
            f"mean TTFT within {AGREE:.0%} of the simulator's:"
            f" at most {found[worst].ratio - 1:+.1%} ({worst})",
            abs(found[worst].ratio - 1) <= AGREE,
        ),
        (f"every request answered: {failed} failed", not failed),
    ]


def swaps(first: Found, second: Found) -> bool:
    """Whether `first` is clearly ahead of `second` in the simulator and behind it live."""
    ahead = first.predicted["mean_s"] * (1 + APART) < second.predicted["mean_s"]
    return ahead and first.live["mean_s"] > second.live["mean_s"]


def rows(arm: Arm, found: Found) -> str:
    """The stages live, simulated, and one over the other where that says something."""
    title = f"{arm.letter} {arm.title}"
    lines = [
        f"{title:25}{name:10}"
        + "".join(f"{1e3 * values[stage]:9.1f}" for stage in STAGES)
        + f"{1e3 * values['mean_s']:9.0f} [{1e3 * values['p99_s']:.0f}]"
        for name, values in (("live", found.live), ("simulated", found.predicted))
    ]
    lines.append(
        f"{'':25}ratio {found.ratio:.3f}; by the client's clock {1e3 * found.client_s:.0f} ms;"
        f" sent at most {1e3 * found.late_s:.1f} ms late"
    )
    return "\n".join(lines)


def rounded(found: Found) -> dict[str, object]:
    """For the JSON line: times in ms."""
    sides = {"live": found.live, "simulated": found.predicted}
    return {
        **{
            side: {name.removesuffix("_s") + "_ms": round(1e3 * s, 2) for name, s in values.items()}
            for side, values in sides.items()
        },
        "ratio": round(found.ratio, 4),
        "failed": found.num_failed,
        "late_ms": round(1e3 * found.late_s, 2),
        "client_ms": round(1e3 * found.client_s, 2),
    }


if __name__ == "__main__":
    main()
