"""The figures: attainment against rate of every case, Figure 1 and Figure 11."""

from collections.abc import Sequence

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
    """As SVG: Figure 11 and the points that the authors saved."""
    widest = max(ablation.RATES)
    letters = {title: letter for letter, title in ABLATION_TITLES.items()}
    lines = {
        letters[name]: [
            (rate / widest, 100 * share) for rate, share in zip(ablation.RATES, shares, strict=True)
        ]
        for name, shares in found.shares.items()
    }
    for letter, name in ("A", "DistServe"), ("B", "vLLM"):
        lines[letter] = [
            (rate / widest, share)
            for rate, share in zip(ablation.RATES, ablation.PAPER[name], strict=True)
        ]
    panel = Panel("66B ShareGPT, 0.4 s and 0.1 s", lines, HIGHEST, _axis(widest))
    return draw("Figure 11: what the searches find", ABLATION_TITLES, [panel], "attained, %")


def _axis(widest: float) -> Axis:
    return Axis("requests a second and GPU", widest, "")
