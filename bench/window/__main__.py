"""What the staggered window brings: eight ways to dispatch, on simulated nodes, over a grid.

    python -m bench.window [--quick | --smoke] [--jobs N] [--requests N] [--out FILE] [--svg FILE]

Every arm of a point serves the same requests, once for each seed, in virtual time and with the
policy objects of the live engine. Loads are shares of what arm C (shortest queue) completes when
overloaded. Prints what is possible at all, then tables, then the aims as met or missed; the last
line is JSON.
"""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from bench.report import emit, save
from bench.window import aims, tables
from bench.window.campaign import Campaign
from bench.window.compare import Compared, rounded
from bench.window.grid import (
    ARMS,
    BY_LETTER,
    MEAN_LIMIT_S,
    P99_LIMIT_S,
    PLANS,
    PROFILE,
    REPORT_LOSS,
    SOUND,
    WORKLOAD,
)
from bench.window.picture import Panel, ceiling_for, draw
from bench.window.runs import MEASURES

RESULTS = Path(__file__).parents[1] / "results"
CUT = 2.5  # a panel ends at so many times G's highest mean: what is far above is not told apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a part of the grid, two minutes")
    size.add_argument("--smoke", action="store_true", help="one point and few requests: seconds")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--requests", type=int, metavar="N", help="of each run, for every rank")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the result as JSON; full: kept")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="mean TTFT against load")
    args = parser.parse_args()
    plan = PLANS["quick" if args.quick else "smoke" if args.smoke else "full"]
    if args.requests:
        plan = replace(plan, requests_per_rank=args.requests)
    if plan.name == "full":
        args.out, args.svg = args.out or RESULTS / "window.json", args.svg or RESULTS / "window.svg"
    began = time.perf_counter()
    values = report(Campaign(plan, args.jobs), args.svg)
    values["wall_s"] = round(time.perf_counter() - began, 1)
    if args.out:
        save(args.out, values)
    emit(values)


def report(campaign: Campaign, svg: Path | None) -> dict[str, object]:
    """Run everything, print it, draw it; what the JSON line holds."""
    plan = campaign.plan
    print(f"{plan.name}: {len(plan.points)} points x {len(ARMS)} arms x {len(plan.seeds)} seeds,")
    print(f"{plan.requests_per_rank} requests per rank a run, one output token each;")
    print(f"profile {PROFILE.name}: {PROFILE.source}")
    print("\n".join(f"  {arm.letter} {arm.title}" for arm in ARMS))
    print(f"H loses {REPORT_LOSS:.0%} of all reports and, of several instances, one after a third")
    saturations = campaign.saturate()
    print("\nWhat is possible: QPS with every token slot of every pass used, QPS that C completes")
    print("when overloaded (the unit of loads), mean TTFT of requests that meet an idle node")
    for (shape, lengths), found in saturations.items():
        print(
            f"  {shape} {lengths:16} {found.ceiling_qps:7.1f}  {found.qps:7.1f}"
            f" ({found.qps / found.ceiling_qps:.0%})  {1e3 * found.floor_s:5.0f} ms"
        )
    compared = campaign.compare()
    rates = campaign.rates()
    lines = [*tables.ttft_tables(compared), *tables.stage_tables(compared)]
    print("\n".join([*lines, *tables.limit_tables(rates)]))
    found_aims = aims.check(compared, rates)
    violations = aims.violations(compared)
    print("\nAims", *found_aims, sep="\n")
    print(f"\nMean TTFT of G above {aims.WORSE} of an arm's:")
    print("\n".join(f"  {one}" for one in violations) or "  never")
    if svg:
        svg.parent.mkdir(parents=True, exist_ok=True)
        svg.write_text(picture(compared))
        print(f"\npicture: {svg}")
    return {
        "bench": "window",
        "plan": plan.name,
        "requests_per_rank": plan.requests_per_rank,
        "seeds": plan.seeds,
        "measures": [f"{name[:-2]}_ms" if name.endswith("_s") else name for name in MEASURES],
        "saturation_qps": {f"{s} {n}": round(v.qps, 2) for (s, n), v in saturations.items()},
        "points": [one.to_json() for one in compared],
        "limits_s": [MEAN_LIMIT_S, P99_LIMIT_S],
        "rates": rates,
        "aims": [asdict(aim) for aim in found_aims],
        "violations": [
            {**asdict(one), "ratio": rounded(one.ratio), "sure": one.sure} for one in violations
        ],
    }


def picture(compared: Sequence[Compared]) -> str:
    """Mean TTFT against load for the workload that is shown, a panel for each shape."""
    shapes: dict[str, list[Compared]] = {}
    for one in compared:
        if (one.point.arrivals, one.point.lengths) == WORKLOAD:
            shapes.setdefault(str(one.point.shape), []).append(one)
    panels = []
    for shape, of_shape in shapes.items():
        lines = {
            arm: [(one.point.load, 1e3 * one.measures[arm]["mean_s"]) for one in of_shape]
            for arm in SOUND
        }
        highest = CUT * max(ms for _, ms in lines["G"])
        visible = [min(ms, highest) for line in lines.values() for _, ms in line]
        instances, ranks = shape.split("x")
        title = f"{instances} instance{'s' * (instances != '1')} of {ranks} ranks"
        panels.append(Panel(title, lines, ceiling_for(visible)))
    title = f"Mean time to first token, simulated: {', '.join(WORKLOAD)} tokens, {PROFILE.name}"
    return draw(title, {arm: BY_LETTER[arm].title for arm in SOUND}, panels, "mean TTFT, ms")


if __name__ == "__main__":
    main()
