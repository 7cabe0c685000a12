"""Figures of runs: attainment against rate and against the SLO's scale, and latencies."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodeserve.errors import ConfigError
from nodeserve.loadgen.bench import Result
from nodeserve.loadgen.measure import SloOf, needed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_INCHES = (5.0, 3.4)
MOST_TICKS = 12
FAR = 8.0  # from the first to the last value of an axis: then it has fewer numbers for each decade
FEW_DIGITS, MANY_DIGITS = (1.0, 2.0, 5.0), (1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
LATENCIES = {"TTFT": "ttft_s", "TPOT": "tpot_s", "worst gap": "worst_gap_s", "E2E": "e2e_s"}


def check_matplotlib(option: str) -> None:
    """ConfigError where figures cannot be drawn: better before an hour's run than after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"figures need matplotlib: pip install 'nodeserve[plot]', or leave {option} out"
        ) from None


def draw(
    results: Sequence[Result],
    slo_of: SloOf,
    goal: float,
    confidence: float,
    folder: Path,
    kinds: Sequence[str],
    forced: bool = True,
) -> list[Path]:
    """Write the figures that these results allow, one file for each of `kinds` (svg, png). Of
    several runs at one rate the last counts, which has the most requests; not one that was cut."""
    import matplotlib

    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    by_rate = {one.rate: one for one in results if not one.given_up}
    results = sorted(by_rate.values(), key=lambda one: one.rate or 0.0)
    figures = {"slo_scale": lambda axes: scales(axes, results, slo_of, goal, forced)}
    if len(results) > 1:
        figures["attainment"] = lambda axes: attainment(axes, results, goal, confidence)
    for title, attribute in LATENCIES.items():
        name = title.lower().replace(" ", "_")
        figures[name] = _latency(results, title, attribute)
    return [path for name, paint in figures.items() for path in _save(folder / name, paint, kinds)]


def attainment(axes: "Axes", results: Sequence[Result], goal: float, confidence: float) -> None:
    """The share of good requests with its interval, by rate."""
    rates = [one.rate for one in results if one.rate is not None]
    shares = [one.report.tally.share for one in results]
    bounds = [one.report.tally.interval(confidence) for one in results]
    below = [max(0.0, share - low) for share, (low, _) in zip(shares, bounds, strict=True)]
    above = [max(0.0, high - share) for share, (_, high) in zip(shares, bounds, strict=True)]
    label = f"with {confidence:.0%} intervals"
    axes.errorbar(rates, shares, yerr=[below, above], marker="o", capsize=3, label=label)
    axes.axhline(goal, linestyle=":", color="grey")
    axes.set(xlabel="requests/s offered", ylabel="attainment", ylim=(0.0, 1.02))
    axes.set_xlim(left=0.0)
    _legend(axes)


def scales(
    axes: "Axes", results: Sequence[Result], slo_of: SloOf, goal: float, forced: bool = True
) -> None:
    """The share of good requests if all limits were multiplied, from the same runs."""
    for result in results:
        needs = sorted(needed(one, slo_of(one.job.arrival), forced) for one in result.samples)
        shares = [(place + 1) / len(needs) for place in range(len(needs))]
        axes.step(needs, shares, where="post", label=_name(result))
    axes.axhline(goal, linestyle=":", color="grey")
    axes.axvline(1.0, linestyle=":", color="grey")
    axes.set(xlabel="SLO scale", ylabel="attainment", xlim=(0.0, 3.0), ylim=(0.0, 1.02))
    _legend(axes)


def _latency(results: Sequence[Result], title: str, attribute: str) -> Any:
    def paint(axes: "Axes") -> None:
        for result in results:
            known = [getattr(one, attribute) for one in result.samples if one.error is None]
            line = sorted(1e3 * one for one in known if one is not None)
            shares = [(place + 1) / len(line) for place in range(len(line))]
            axes.step(line, shares, where="post", label=_name(result))
        axes.set(xlabel=f"{title}, ms", ylabel="share of requests", ylim=(0.0, 1.02))
        _log_scale(axes)
        _legend(axes)

    return paint


def _log_scale(axes: "Axes") -> None:
    """With plain numbers, as many as have room."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    digits = FEW_DIGITS if high > FAR * low else MANY_DIGITS
    axes.xaxis.set_major_locator(LogLocator(subs=digits, numticks=MOST_TICKS))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(axes: "Axes") -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")


def _name(result: Result) -> str:
    return f"{result.rate:.3g}/s" if result.rate is not None else "all"


def _save(stem: Path, paint: Any, kinds: Sequence[str]) -> list[Path]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    paint(figure.subplots())
    paths = [stem.with_suffix(f".{kind}") for kind in kinds]
    for path in paths:
        figure.savefig(path, dpi=160)
    return paths
