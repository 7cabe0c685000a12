"""Lockstep of expert-parallel ranks at DeepSeek-V3's size, simulated: the window on and off.

    python -m bench.moe [--smoke] [--requests N] [--jobs N] [--out FILE]

Prefill instances of 32 H100 each, as DeepSeek runs them: attention for each rank alone, experts
over all 32, so a pass lasts as long as its slowest rank and ranks without work wait. What decides
over that is which rank gets which prompt, and when a pass begins. Requests are dispatched on
arrival, by turns or to the shortest queue; when an instance is free (pull); and by the staggered
window. All serve the same prompts, with the policy objects of the live engine in virtual time; one
output token each, so that nothing but prefill decides the time to the first.

The ceiling is tokens a second with every rank's budget full in every pass; loads are shares of it.
Pass times are counted from the model and set to published rates (nodeserve/policy/deepseek.py);
they are no measurement of this engine. The last line is JSON.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from bench.report import emit, save
from nodeserve.layout import Shape
from nodeserve.plan.records import Arrival, Scenario
from nodeserve.plan.simulator import simulate
from nodeserve.plan.summary import summarize
from nodeserve.plan.workloads import Workload, generate, parse_gaps, parse_lengths
from nodeserve.policy.cost import RankWork
from nodeserve.policy.profile import Family, Profile
from nodeserve.policy.profiles import find_profile
from nodeserve.policy.units import DispatchOptions

FAMILY = "deepseek-v3-fp8-h100"
INSTANCES, RANKS = 4, 32
LENGTHS = "lognormal:1500"
ARMS = {
    "round-robin": "on arrival, by turns",
    "shortest-queue": "on arrival, to the shortest queue",
    "pull": "when an instance is free",
    "staggered": "the window",
}
IMMEDIATE = ("round-robin", "shortest-queue")
RESULT = Path(__file__).parent / "results" / "moe.json"


class Point(NamedTuple):
    """One run."""

    arm: str
    load: float  # share of the ceiling
    seed: int
    num_requests: int


@dataclass(frozen=True, slots=True)
class Row:
    """An arm at a load, over all seeds."""

    arm: str
    load: float
    mean_ttft_ms: float
    p99_ttft_ms: float
    utilisation: float  # tokens of passes over those that there was room for
    balance: float  # mean over maximum of the ranks' own costs
    active_ranks: float  # share of an instance's that had tokens
    busy: float  # share of the instances' time in passes

    def __str__(self) -> str:
        times = f"{self.mean_ttft_ms:8.0f} {self.p99_ttft_ms:8.0f} ms"
        shares = (self.utilisation, self.balance, self.active_ranks, self.busy)
        return f"{self.load:5.0%} {self.arm:15} {times}" + "".join(f"{one:9.0%}" for one in shares)


def rank_profile() -> Profile:
    family = find_profile(FAMILY)
    assert isinstance(family, Family), FAMILY
    return family.of(Shape(ep=RANKS))


def ceiling_tokens_per_s() -> float:
    """Of all instances, with prompts of the mean length."""
    profile = rank_profile()
    budget, mean = profile.max_num_batched_tokens, float(LENGTHS.partition(":")[2])
    full = [RankWork(budget, budget * mean / 2)] * RANKS
    return INSTANCES * RANKS * budget / profile.cost.pass_s(full)


def requests_of(point: Point) -> list[Arrival]:
    lengths, one = parse_lengths(LENGTHS), parse_lengths("fixed:1")
    qps = point.load * ceiling_tokens_per_s() / float(LENGTHS.partition(":")[2])
    gaps = parse_gaps("poisson")
    return generate(Workload(qps, point.num_requests, lengths, one, gaps, point.seed), 32_768)


def run(point: Point) -> Row:
    profile = rank_profile()
    budget, num_seqs = profile.max_num_batched_tokens, profile.max_num_seqs
    scenario = Scenario(
        layout=f"{INSTANCES}p:ep{RANKS},1d:ep{RANKS}",
        profile=FAMILY,
        dispatch=DispatchOptions(admission=point.arm, budget=budget, max_num_seqs=num_seqs),
        seed=point.seed,
    )
    summary = summarize(simulate(scenario, requests_of(point)), scenario)
    assert summary is not None and summary.prefill is not None, "nothing was served"
    assert set(summary.outcomes) == {"length"}, summary.outcomes
    passes, ttft = summary.prefill, summary.ttft_s
    return Row(
        point.arm,
        point.load,
        1e3 * ttft.mean,
        1e3 * ttft.p99,
        passes.chunk_utilisation,
        passes.balance,
        passes.active_ranks / RANKS,
        passes.busy_share,
    )


def mean_of(rows: Iterable[Row]) -> Row:
    """The mean over seeds of one arm at one load."""
    every = list(rows)
    names = [name for name in Row.__slots__ if name not in ("arm", "load")]
    means = {name: sum(getattr(row, name) for row in every) / len(every) for name in names}
    return Row(every[0].arm, every[0].load, **means)


def ratio(rows: list[Row], load: float) -> tuple[float, str]:
    """Mean TTFT of the window over that of the best arm that dispatches on arrival, and which."""
    found = {row.arm: row.mean_ttft_ms for row in rows if row.load == load}
    best = min(IMMEDIATE, key=found.__getitem__)
    return found["staggered"] / found[best], best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="one load and few requests")
    parser.add_argument("--requests", type=int, default=40, metavar="N", help="a rank, each run")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the result as JSON; full: kept")
    args = parser.parse_args()
    loads, seeds = ((0.6,), (11,)) if args.smoke else ((0.3, 0.6, 0.9), (11, 23))
    per_rank = 4 if args.smoke else args.requests
    points = [
        Point(arm, load, seed, per_rank * INSTANCES * RANKS)
        for load in loads
        for arm in ARMS
        for seed in seeds
    ]
    began = time.perf_counter()
    ceiling = ceiling_tokens_per_s()
    print(f"{INSTANCES} instances of {RANKS} ranks, {FAMILY}, prompts {LENGTHS}")
    print(f"ceiling: {ceiling:,.0f} tokens/s, {8 * ceiling / INSTANCES / RANKS:,.0f} a node of 8")
    print("\n".join(f"  {arm:15} {words}" for arm, words in ARMS.items()))
    print(f"{'load':>5} {'':15} {'TTFT':>8} {'p99':>8}      filled  balance   active     busy")
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        found = pool.map(run, points, chunksize=1)
    rows = []
    for first in range(0, len(found), len(seeds)):
        rows.append(mean_of(found[first : first + len(seeds)]))
        print(rows[-1])
    ratios = {load: ratio(rows, load) for load in loads}
    for load, (value, best) in ratios.items():
        print(f"at {load:.0%} the window takes {value:.3f} of the mean TTFT of {best}")
    values = {
        "bench": "moe",
        "family": FAMILY,
        "shape": f"{INSTANCES}x{RANKS}",
        "requests_per_rank": per_rank,
        "ceiling_tokens_per_s": round(ceiling),
        "rows": [asdict(row) for row in rows],
        "ratios": {str(load): round(value, 4) for load, (value, _) in ratios.items()},
        "wall_s": round(time.perf_counter() - began, 1),
    }
    if args.out or not args.smoke:
        save(args.out or RESULT, values)
    emit(values)


if __name__ == "__main__":
    main()
