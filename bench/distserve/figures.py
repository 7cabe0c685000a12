"""The figures: attainment against rate of every case, Figure 1 and Figure 11."""

from collections.abc import Mapping, Sequence

from bench.distserve import ablation
from bench.distserve.cases import CHUNKED, DISAGGREGATED, PREFILL_FIRST
from bench.distserve.endtoend import Result
from bench.window.picture import Axis, Panel, draw

TITLES = {
    "G": "disaggregated",
    "C": "prefill-first",
    "D": "chunked prefill",
    "A": "the paper: DistServe",
    "B": "the paper: vLLM",
}
LETTERS = {DISAGGREGATED: "G", PREFILL_FIRST: "C", CHUNKED: "D"}
ABLATION_TITLES = {
    "G": "DistServe-High",
    "E": "DistServe-Low",
    "C": "vLLM++",
    "D": "vLLM",
    "A": "the paper: DistServe",
    "B": "the paper: vLLM",
}
HIGHEST = 100.0  # percent
RATE = "requests a second and GPU"


def curves(results: Sequence[Result]) -> str:
    """As SVG: a panel for each case."""
    panels = []
    for result in results:
        case = result.case
        paper, limits = case.curve, case.limits
        widest = max(point.rate for point in paper)
        lines = {
            LETTERS[way]: [(rate / widest, 100 * share) for rate, share in curve]
            for way, curve in result.curves.items()
        }
        lines["A"] = [(point.rate / widest, point.distserve) for point in paper]
        lines["B"] = [(point.rate / widest, point.vllm) for point in paper]
        title = f"{case.name}, {limits.ttft_s:g} s and {limits.tpot_s:g} s"
        panels.append(Panel(title, lines, HIGHEST, _axis(widest)))
    title = "Requests within both limits, the paper's shapes, simulated"
    return draw(title, TITLES, panels, "attained, %")


def eleven(found: ablation.Curves) -> str:
    """As SVG: Figure 11, both panels, and the points that the authors saved."""
    title = "66B ShareGPT, 0.4 s and 0.1 s"
    panels = [
        _panel(title, ablation.RATES, found.shares, ablation.PAPER, RATE),
        _panel(
            f"a factor on both, {ablation.SCALED_RATE:g} requests a second and GPU",
            ablation.SCALES,
            found.scaled,
            ablation.PAPER_SCALED,
            "SLO scale",
        ),
    ]
    return draw("Figure 11: what the searches find", ABLATION_TITLES, panels, "attained, %")


def _panel(
    title: str,
    xs: Sequence[float],
    ours: Mapping[str, Sequence[float]],
    paper: Mapping[str, Sequence[float]],
    label: str,
) -> Panel:
    """Our shares by way and the paper's percents by system, against `xs`."""
    widest = max(xs)
    across = [x / widest for x in xs]
    letters = {title: letter for letter, title in ABLATION_TITLES.items()}
    lines = {
        letters[name]: list(zip(across, [100 * share for share in shares], strict=True))
        for name, shares in ours.items()
    }
    for name, percents in paper.items():
        lines[letters[f"the paper: {name}"]] = list(zip(across, percents, strict=True))
    return Panel(title, lines, HIGHEST, _axis(widest, label))


def _axis(widest: float, label: str = RATE) -> Axis:
    return Axis(label, widest, "")
