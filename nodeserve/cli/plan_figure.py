"""The figure of `nodeserve plan`: the finalists' goodputs, and their attainment by rate."""

from pathlib import Path
from typing import TYPE_CHECKING

from nodeserve.errors import ConfigError
from nodeserve.plan.estimates import Estimate
from nodeserve.plan.planner import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_INCHES = (10.0, 4.4)
ROUND = 10.0  # percent, to which the lowest attainment drawn is rounded down


def check_drawing(path: Path) -> None:
    """Before anything takes long."""
    if path.suffix not in (".png", ".svg"):
        raise ConfigError(f"--figure {path}: use a name that ends in .png or .svg")
    from nodeserve.loadgen.figures import check_matplotlib

    check_matplotlib("--figure")


def draw(report: Report, path: Path, title: str) -> None:
    """Left the goodput of each finalist with where it lies, right its attainment by rate, in one
    colour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _goodputs(left, report)
    _attainments(right, report)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path)


def _goodputs(axes: "Axes", report: Report) -> None:
    num_gpus = report.question.num_gpus
    for place, one in enumerate(report.ranked):
        rate = one.goodput / num_gpus
        # Without an end above, the whisker ends with the bound on paper, which no run exceeds.
        high = (one.most if one.high is None else one.high) / num_gpus
        ends = [[max(0.0, rate - one.low / num_gpus)], [max(0.0, high - rate)]]
        axes.barh(place, rate, color=f"C{place}", height=0.6)
        axes.errorbar(rate, place, xerr=ends, color="black", capsize=4)
    axes.set_yticks(range(len(report.ranked)), [_name(one) for one in report.ranked])
    axes.invert_yaxis()
    axes.set_xlim(left=0.0)
    axes.set_xlabel(f"goodput, requests a second and GPU, {report.question.confidence:.0%} range")


def _attainments(axes: "Axes", report: Report) -> None:
    num_gpus, goal = report.question.num_gpus, 100 * report.question.goal
    lowest = goal
    for place, one in enumerate(report.ranked):
        probes = sorted(one.probes, key=lambda probe: probe.rate)
        shares = [100 * probe.tally.share for probe in probes]
        rates = [probe.rate / num_gpus for probe in probes]
        axes.plot(rates, shares, marker="o", color=f"C{place}", label=_name(one))
        lowest = min([lowest, *shares])
    axes.axhline(goal, color="grey", linestyle=":")
    axes.set_xlabel("requests a second and GPU")
    axes.set_ylabel("in time, %")
    axes.set_ylim(max(0.0, lowest // ROUND * ROUND - ROUND / 2), 102.0)


def _name(one: Estimate) -> str:
    window = "" if one.candidate.window_s is None else ", no window"
    return f"{one.candidate.layout}, chunk {one.candidate.max_num_batched_tokens}{window}"
