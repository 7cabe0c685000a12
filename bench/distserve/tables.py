"""What was found beside the paper's numbers, as lines of text and as rows of one table."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bench.distserve import ablation, figure1
from bench.distserve.cases import CHUNKED, DISAGGREGATED, PREFILL_FIRST
from bench.distserve.endtoend import SAME, SEARCHED, WAYS, Result
from bench.distserve.validate import Compared

SYSTEM = {DISAGGREGATED: "DistServe", PREFILL_FIRST: "vLLM", CHUNKED: "DeepSpeed-MII"}


class Row(NamedTuple):
    """`ours` None: never attained, so there is no ratio either."""

    what: str
    paper: float | None
    ours: float | None

    @property
    def difference(self) -> float | None:
        """Relative to the paper's."""
        return self.ours / self.paper - 1 if self.paper and self.ours is not None else None


def validation_lines(compared: Sequence[Compared]) -> list[str]:
    lines = ["run                      attained %      TTFT p50 ms       TPOT p50 ms"]
    for one in compared:
        points, ttft, tpot = one.errors
        verdict = ("met" if one.met else "missed") if one.below_knee else "beyond the knee"
        lines.append(
            f"{one.name:23} {100 * one.shares[0]:5.1f} {100 * one.shares[1]:5.1f}"
            f" {100 * points:+5.1f}"
            f"  {1e3 * one.ttft_s[0]:6.0f} {1e3 * one.ttft_s[1]:6.0f} {ttft:+4.0%}"
            f"  {1e3 * one.tpot_s[0]:6.1f} {1e3 * one.tpot_s[1]:6.1f} {tpot:+4.0%}  {verdict}"
        )
    return lines


def figure1_rows(found: Mapping[figure1.Bar, float]) -> list[Row]:
    rows = []
    for kernels in figure1.FAMILIES:
        rates = {name: found[figure1.Bar(kernels, name)] for name in figure1.PAPER}
        rows += [
            Row(f"Figure 1, {kernels}: {name}, requests/s/GPU", paper, rates[name])
            for name, paper in figure1.PAPER.items()
        ]
        rows.append(
            Row(
                f"Figure 1, {kernels}: 2 prefill, 1 decode over collocated",
                2.1,
                _ratio(rates["2 prefill, 1 decode"], rates["collocated"]),
            )
        )
    return rows


def endtoend_rows(results: Sequence[Result]) -> list[Row]:
    rows = []
    for result in results:
        name, paper = result.case.name, result.case.paper
        for way, rate, scale in zip(WAYS, paper.rates, paper.scales, strict=True):
            rows.append(Row(f"{name}: {way}, requests/s/GPU", rate, result.rates[way]))
            rows.append(Row(f"{name}: {way}, SLO scale", scale, result.scales[way]))
        ours, scale = result.rates[DISAGGREGATED], result.scales[DISAGGREGATED]
        for place, way in enumerate(SEARCHED, 1):
            theirs, their_scale = paper.rates[place], paper.scales[place]
            rows += [
                Row(
                    f"{name}: rate over {way}, the paper's shapes",
                    paper.rates[0] / theirs if theirs else None,
                    _ratio(ours, result.rates[way]),
                ),
                Row(
                    f"{name}: SLO tighter than {way}, the paper's shapes",
                    their_scale / paper.scales[0] if their_scale else None,
                    _ratio(result.scales[way], scale),
                ),
            ]
        rows += _searched_rows(result)
    return rows


def _searched_rows(result: Result) -> list[Row]:
    """Of both in their best shapes."""
    if not result.searched:
        return []
    name, best = result.case.name, (SAME, DISAGGREGATED)
    rows = []
    for kernels, way in result.searched:
        if way == DISAGGREGATED:
            continue
        pairs = {
            "rate over": (result.searched[best].rate, result.searched[kernels, way].rate),
            "SLO tighter than": (
                result.searched_scales[kernels, way],
                result.searched_scales[best],
            ),
        }
        if result.steady_searched.get((kernels, way)) is not None:
            pairs["steady rate over"] = (
                result.steady_searched[best],
                result.steady_searched[kernels, way],
            )
        rows += [
            Row(f"{name}: {what} {way}, best shapes, {kernels}", None, _ratio(*pair))
            for what, pair in pairs.items()
        ]
    return rows


def searched_lines(results: Sequence[Result]) -> list[str]:
    """The shapes that were best, and the rates of long runs."""
    lines = [
        f"{'case':15} {'arm':44} {'layout':24} chunk   rate  steady",
    ]
    for result in results:
        name = result.case.name
        for way in WAYS:
            arm = result.case.arm(way)
            steady = f"{result.steady[way]:6.3f}" if result.steady else ""
            chunk = str(arm.budget) if way == CHUNKED else ""
            lines.append(
                f"{name:15} {way:44} {arm.layout:24} {chunk:>5} {result.rates[way]:6.3f}  {steady}"
            )
        for (kernels, way), found in result.searched.items():
            steady_rate = result.steady_searched.get((kernels, way))
            steady = "" if steady_rate is None else f"{steady_rate:6.3f}"
            chunk = str(found.arm.budget) if way == CHUNKED else ""
            lines.append(
                f"{name:15} {f'{way}, searched, {kernels}':44} {found.arm.layout:24} {chunk:>5}"
                f" {found.rate:6.3f}  {steady}"
            )
    return lines


def ablation_rows(curves: ablation.Curves) -> list[Row]:
    """Both panels of Figure 11; the paper has one line for each pair of ways."""
    rows = []
    for name, layout in curves.layouts.items():
        system, way = name.rstrip("+").partition("-")[0], f"{name} ({layout})"
        panel = zip(ablation.RATES, ablation.PAPER[system], curves.shares[name], strict=True)
        rows += [
            Row(f"Figure 11: {way} at {rate:g}/s/GPU, % attained", theirs, 100 * ours)
            for rate, theirs, ours in panel
        ]
        panel = zip(
            ablation.SCALES, ablation.PAPER_SCALED[system], curves.scaled[name], strict=True
        )
        rows += [
            Row(f"Figure 11b: {way} at SLO scale {scale:g}, % attained", theirs, 100 * ours)
            for scale, theirs, ours in panel
        ]
        least = ablation.paper_smallest(system), curves.smallest[name]
        rows.append(Row(f"Figure 11b: {way}, smallest SLO scale", *least))
    return rows


def search_rows(seconds: Mapping[int, float]) -> list[Row]:
    return [
        Row(f"search on {number} GPUs, seconds", ablation.SEARCH_S[number], taken)
        for number, taken in seconds.items()
    ]


def lines_of(rows: Sequence[Row]) -> list[str]:
    """One table: what, the paper's number, ours, the difference."""
    width = max(len(row.what) for row in rows)
    lines = [f"{'':{width}}  {'paper':>8} {'ours':>8}  difference"]
    for row in rows:
        difference = "" if row.difference is None else f"{row.difference:+.0%}"
        lines.append(f"{row.what:{width}}  {_number(row.paper)} {_number(row.ours)}  {difference}")
    return lines


def _number(value: float | None) -> str:
    return f"{value:8.3g}" if value is not None else f"{'-':>8}"


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None
