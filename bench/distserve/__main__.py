"""DistServe's evaluation again, in the simulator: its figures, its table, its numbers and ours.

    python -m bench.distserve [--smoke] [--jobs N] [--out FILE] [--figures FOLDER]

First the simulator against measured runs on A100 and H200, then Figure 1, the end-to-end table
(with the paper's shapes, and with the baselines in their best shapes), Figure 11 and search times.
Needs the published data and says so where they are not. A full run is kept, and the tables of
docs/distserve.md with it. The last line is JSON.
"""

import argparse
import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from bench.distserve import ablation, endtoend, figure1, figures, page, tables, validate
from bench.distserve.cases import CASES
from bench.distserve.data import missing
from bench.distserve.endtoend import Result
from bench.distserve.runs import Protocol
from bench.distserve.tasks import Pool
from bench.hopper import validate as h200
from bench.report import emit, save

RESULTS = Path(__file__).parents[1] / "results"
STEADY = Protocol((0,), seconds=180.0, warm_up_s=60.0)
SHORT_ANSWERS = Protocol((0,), seconds=60.0, warm_up_s=10.0)  # of Figure 1: settled in seconds
FULL = endtoend.Plan((0, 1), STEADY)
SMOKE = endtoend.Plan((0,), None, searches=False, curves=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--smoke", action="store_true", help="one case, few requests: seconds")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the result as JSON; full: kept")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="likewise, as SVG")
    args = parser.parse_args()
    if (folder := missing()) is not None:
        reason = f"{folder} is not here: set NODESERVE_DATA"
        print(f"skipped: {reason}")
        emit({"bench": "distserve", "skipped": reason})
        return
    if not args.smoke:
        args.out, args.figures = args.out or RESULTS / "distserve.json", args.figures or RESULTS
    began_s = time.perf_counter()
    with Pool(1 if args.smoke else args.jobs) as pool:
        values = report_smoke(pool) if args.smoke else report(pool, args.figures)
    values["wall_s"] = round(time.perf_counter() - began_s, 1)
    if args.out:
        save(args.out, values)
    if args.out == page.RESULT:
        page.write()
    emit(values)


def report_smoke(pool: Pool) -> dict[str, object]:
    """One measured run and one case, by the same code."""
    compared = [validate.compare("distserve-300-3")]
    results = endtoend.run(CASES[1:2], SMOKE, pool)
    rows = tables.endtoend_rows(results)
    show("The simulator against measured runs", tables.validation_lines(compared))
    show("The paper and this simulation", tables.lines_of(rows))
    return values_of(compared, rows, results)


def report(pool: Pool, folder: Path) -> dict[str, object]:
    """Run everything, print it, draw it; what the JSON line holds."""
    compared = list(pool.each(validate.compare, list(validate.RUNS), "measured runs"))
    show("The simulator against measured runs on A100", tables.validation_lines(compared))
    hopper = list(pool.each(h200.compare, h200.points(), "runs on H200"))
    show("The simulator against measured runs on H200, Llama 3.1 70B", h200.lines(hopper))
    folder.mkdir(parents=True, exist_ok=True)
    rows = shown("Figure 1", tables.figure1_rows(figure1.run(SHORT_ANSWERS, pool)))
    curves = ablation.run(Protocol((0,), 25), pool)
    (folder / "distserve_figure11.svg").write_text(figures.eleven(curves))
    rows += shown("Figure 11", tables.ablation_rows(curves))
    taken = ablation.search_times(tuple(ablation.SEARCH_S), pool)
    rows += shown("Search", tables.search_rows(taken))
    results = endtoend.run(CASES, FULL, pool)
    (folder / "distserve_curves.svg").write_text(figures.curves(results))
    show("Shapes that were best, and runs of minutes", tables.searched_lines(results))
    rows += tables.endtoend_rows(results)
    show("The paper and this simulation", tables.lines_of(rows))
    return values_of(compared, rows, results) | {"h200": [_h200(one) for one in hopper]}


def values_of(
    compared: Iterable[validate.Compared], rows: Iterable[tables.Row], results: Iterable[Result]
) -> dict[str, object]:
    return {
        "bench": "distserve",
        "validation": [
            {"run": one.name, "below_knee": one.below_knee, "met": one.met, **_rounded(one)}
            for one in compared
        ],
        "rows": [{"what": row.what, "paper": row.paper, "ours": _round(row.ours)} for row in rows],
        "searched": [
            {
                "case": result.case.name,
                "kernels": kernels,
                **asdict(found.arm),
                "rate": _round(found.rate),
                "scale": _round(result.searched_scales[kernels, way]),
                "steady_rate": _round(result.steady_searched.get((kernels, way))),
            }
            for result in results
            for (kernels, way), found in result.searched.items()
        ],
        "steady_rates": {
            result.case.name: {way: _round(rate) for way, rate in result.steady.items()}
            for result in results
        },
    }


def show(title: str, lines: Iterable[str]) -> None:
    print("", title, *lines, sep="\n", flush=True)


def shown(title: str, rows: list[tables.Row]) -> list[tables.Row]:
    show(title, tables.lines_of(rows))
    return rows


def _rounded(one: validate.Compared) -> dict[str, float | None]:
    names = ("attained_points", "ttft_error", "tpot_error")
    return {name: _round(error) for name, error in zip(names, one.errors, strict=True)}


def _h200(one: h200.Compared) -> dict[str, float | None]:
    ttft, tpot = one.errors
    tp, prompt, _, clients, _, _ = one.point
    shape = {"tp": tp, "prompt": prompt, "clients": clients}
    return {**shape, "ttft_error": _round(ttft), "tpot_error": _round(tpot)}


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


if __name__ == "__main__":
    main()
