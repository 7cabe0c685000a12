"""The tables of docs/distserve.md, written from the kept result.

    python -m bench.distserve.page

Each table stands between `<!-- table NAME -->` and `<!-- end -->`; the words around are people's.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.distserve import ablation, figure1
from bench.distserve.cases import CASES, CHUNKED, DISAGGREGATED
from bench.distserve.endtoend import KERNELS, SAME, SEARCHED, WAYS

ROOT = Path(__file__).parents[2]
RESULT, PAGE = ROOT / "bench" / "results" / "distserve.json", ROOT / "docs" / "distserve.md"
NAMES = [case.name for case in CASES]


class Kept(NamedTuple):
    """A result file's parts, by what they are asked for."""

    rows: Mapping[str, tuple[float | None, float | None]]  # of the paper, and ours
    searched: Mapping[tuple[str, str, str], Mapping[str, Any]]  # by case, kernels and way
    steady: Mapping[str, Mapping[str, float]]


def read(text: str) -> Kept:
    values = json.loads(text)
    return Kept(
        {row["what"]: (row["paper"], row["ours"]) for row in values["rows"]},
        {(one["case"], one["kernels"], one["way"]): one for one in values["searched"]},
        values["steady_rates"],
    )


def figure1_table(kept: Kept) -> list[str]:
    first, second = figure1.FAMILIES
    lines = [f"| | paper | {first} | difference | {second} | difference |", _rule(1, 5)]
    whats = {name: f"{name}, requests/s/GPU" for name in figure1.PAPER}
    whats["ratio of the last to the first"] = "2 prefill, 1 decode over collocated"
    for name, what in whats.items():
        pairs = [kept.rows[f"Figure 1, {kernels}: {what}"] for kernels in (first, second)]
        cells = [cell for paper, ours in pairs for cell in (_short(ours), _percent(paper, ours))]
        lines.append(_line(name, _short(pairs[0][0]), *cells))
    return lines


def rates_table(kept: Kept) -> list[str]:
    return _paper_table(kept, "requests/s/GPU", "rate over")


def scales_table(kept: Kept) -> list[str]:
    return _paper_table(kept, "SLO scale", "SLO tighter than")


def _paper_table(kept: Kept, what: str, over: str) -> list[str]:
    """The paper's shapes: `what` of each way, and what disaggregation has `over` it."""
    lines = ["| case | | paper | ours | difference | ratio, paper | ratio, ours |", _rule(2, 5)]
    for name in NAMES:
        for way in WAYS:
            paper, ours = kept.rows[f"{name}: {way}, {what}"]
            ratios = kept.rows.get(f"{name}: {over} {way}, the paper's shapes", (None, None))
            difference = _percent(paper, ours) if ours else "-"
            cells = (_short(paper), _short(ours), difference, *map(_short, ratios))
            lines.append(_line(name, way, *cells))
    return lines


def steady_table(kept: Kept) -> list[str]:
    lines = [_line("case", *WAYS), _rule(1, len(WAYS))]
    return lines + [
        _line(name, *(_short(kept.steady[name][way]) for way in WAYS)) for name in NAMES
    ]


def figure11_table(kept: Kept) -> list[str]:
    points = [f"{rate:g}" for rate in ablation.RATES]
    lines = [_line("requests/s/GPU", *points), _rule(1, len(points))]
    for way in _ablated(kept):
        whats = [f"Figure 11: {way} at {rate}/s/GPU, % attained" for rate in points]
        lines.append(_line(_named(way), *(_beside(kept.rows[what]) for what in whats)))
    return lines


def figure11b_table(kept: Kept) -> list[str]:
    points = [f"{scale:g}" for scale in ablation.SCALES]
    lines = [_line("SLO scale", *points, "smallest"), _rule(1, len(points) + 1)]
    for way in _ablated(kept):
        whats = [f"Figure 11b: {way} at SLO scale {scale}, % attained" for scale in points]
        whats.append(f"Figure 11b: {way}, smallest SLO scale")
        lines.append(_line(_named(way), *(_beside(kept.rows[what]) for what in whats)))
    return lines


def baselines_table(kept: Kept) -> list[str]:
    """Baselines in their best shapes, under the disaggregated system in the paper's."""
    lines = [
        "| case | | its kernels: layout | rate | ratio | tighter"
        " | DistServe's: layout | rate | ratio | tighter |",
        "| --- | --- | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for name in NAMES:
        rate, scale = _of_paper_shape(kept, name)
        for way in SEARCHED:
            cells = []
            for kernels in KERNELS:
                one = kept.searched[name, kernels, way]
                chunk = f", {one['budget']}" if way == CHUNKED else ""
                cells += [f"`{_plain(one['layout'])}`{chunk}", _short(one["rate"])]
                cells += [_ratio(rate, one["rate"]), _ratio(one["scale"], scale)]
            lines.append(_line(name, way, *cells))
    return lines


def same_kernels_table(kept: Kept) -> list[str]:
    lines = [
        _line("case", DISAGGREGATED, *(cell for way in SEARCHED for cell in (way, "ratio"))),
        _rule(1, 1 + 2 * len(SEARCHED)),
    ]
    for name in NAMES:
        ours = kept.steady[name][DISAGGREGATED]
        theirs = [kept.searched[name, SAME, way]["steady_rate"] for way in SEARCHED]
        cells = [cell for rate in theirs for cell in (_short(rate), _ratio(ours, rate))]
        lines.append(_line(name, _short(ours), *cells))
    return lines


def own_best_table(kept: Kept) -> list[str]:
    """The disaggregated system in the paper's shape and in its own best one."""
    lines = [
        "| case | the paper's shape: rate | scale | steady rate"
        " | best shape | rate | scale | steady rate |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for name, case in zip(NAMES, CASES, strict=True):
        best, own = kept.searched[name, SAME, DISAGGREGATED], case.arm(DISAGGREGATED).layout
        layout = f"`{_plain(best['layout'])}`"
        layout += " (the paper's)" if _plain(best["layout"]) == _plain(own) else ""
        paper = (*_of_paper_shape(kept, name), kept.steady[name][DISAGGREGATED])
        found = best["rate"], best["scale"], best["steady_rate"]
        lines.append(_line(name, *map(_short, paper), layout, *map(_short, found)))
    return lines


TABLES: Mapping[str, Callable[[Kept], list[str]]] = {
    "figure 1": figure1_table,
    "rates": rates_table,
    "scales": scales_table,
    "steady": steady_table,
    "figure 11": figure11_table,
    "figure 11b": figure11b_table,
    "baselines": baselines_table,
    "same kernels": same_kernels_table,
    "own best": own_best_table,
}


def filled(page: str, kept: Kept) -> str:
    """The page with the tables of `kept`; ValueError if one has no place in it."""
    for name, table in TABLES.items():
        begin, end = f"<!-- table {name} -->\n", "<!-- end -->"
        if page.count(begin) != 1:
            raise ValueError(f"{page.count(begin)} places for the table {name!r}, not one")
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = before + begin + "\n".join(table(kept)) + "\n" + end + after
    return page


def _of_paper_shape(kept: Kept, name: str) -> tuple[float | None, float | None]:
    """Rate and SLO scale of the disaggregated system."""
    whats = (f"{name}: {DISAGGREGATED}, {what}" for what in ("requests/s/GPU", "SLO scale"))
    rate, scale = (kept.rows[what][1] for what in whats)
    return rate, scale


def _ablated(kept: Kept) -> list[str]:
    """Figure 11's lines, as the rows call them: "NAME (LAYOUT)"."""
    found = (re.fullmatch(r"Figure 11b: (.*), smallest SLO scale", what) for what in kept.rows)
    return [one[1] for one in found if one]


def _named(way: str) -> str:
    name, _, layout = way.rstrip(")").partition(" (")
    return f"{name}, `{_plain(layout)}`"


def _plain(layout: str) -> str:
    """Without the degrees that are 1."""
    return re.sub(r":(?=,|$)", "", re.sub(r"(tp|pp)1\b\.?|\.pp1\b", "", layout))


def _beside(pair: tuple[float | None, float | None]) -> str:
    paper, ours = pair
    return f"{_short(ours)} ({_short(paper)})"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _ratio(above: float | None, below: float | None) -> str:
    return _short(above / below) if above and below else "-"


def _percent(paper: float | None, ours: float | None) -> str:
    return f"{ours / paper - 1:+.0%}" if paper and ours is not None else "-"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(words: int, numbers: int) -> str:
    return _line(*["---"] * words, *["---:"] * numbers)


def write() -> None:
    """The kept result's tables into the page."""
    PAGE.write_text(filled(PAGE.read_text(), read(RESULT.read_text())))


if __name__ == "__main__":
    write()
