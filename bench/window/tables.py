"""The report as text."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from bench.window.aims import rate_ratios, shown
from bench.window.compare import Compared
from bench.window.grid import BY_LETTER, MEAN_LIMIT_S, P99_LIMIT_S, WORKLOAD
from nodeserve.plan.summary import STAGES


def ttft_tables(compared: Iterable[Compared]) -> Iterator[str]:
    """Mean / P99 TTFT by load, a table for each shape and workload."""
    for (shape, arrivals, lengths), group in groupby(
        compared, key=lambda one: (one.point.shape, one.point.arrivals, one.point.lengths)
    ):
        rows = list(group)
        yield f"\n{shape}, {arrivals} arrivals, {lengths} tokens: mean / P99 TTFT in ms"
        arms = "".join(f"{arm:>13}" for arm in rows[0].measures)
        yield f"{'load':>5}{'QPS':>7}{arms}   G / best immediate, mean and P99 (95 %)"
        for one in rows:
            cells = "".join(
                f"{_pair(values['mean_s'], values['p99_s']):>13}"
                for values in one.measures.values()
            )
            ratios = f"{shown(one.mean)} of {one.best}, {shown(one.p99)}"
            yield f"{one.point.load:>5.0%}{one.qps:>7.1f}{cells}   {ratios}"


def stage_tables(compared: Iterable[Compared]) -> Iterator[str]:
    """Where the time went and how full passes were, for one workload."""
    for one in compared:
        if (one.point.arrivals, one.point.lengths) != WORKLOAD:
            continue
        yield f"\n{one.point}: stages of TTFT in ms, then passes"
        yield (
            f"{'':27}{'scheduler':>10}{'transit':>9}{'device':>9}{'prefill':>9}{'return':>8}"
            f"{'pass ms':>10}{'used':>7}{'balance':>9}{'active':>8}{'busy':>7}"
        )
        for arm, values in one.measures.items():
            stages = [1e3 * values[stage] for stage in STAGES]
            yield (
                f"{arm} {BY_LETTER[arm].title:25}"
                + "".join(f"{ms:>{n}.1f}" for ms, n in zip(stages, (10, 9, 9, 9, 8), strict=True))
                + f"{1e3 * values['pass_s']:>10.0f}{values['utilisation']:>7.0%}"
                + f"{values['balance']:>9.2f}{values['active']:>8.2f}{values['busy']:>7.0%}"
            )


def limit_tables(
    rates: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
) -> Iterator[str]:
    """Highest QPS under each limit, mean over seeds."""
    if not rates:
        return
    yield (
        f"\nHighest QPS with mean TTFT <= {MEAN_LIMIT_S:g} s | P99 <= {P99_LIMIT_S:g} s"
        f" ({' '.join(WORKLOAD)}; mean over seeds)"
    )
    for shape, of_shape in rates.items():
        yield f"{shape}: " + "  ".join(
            f"{arm} {_mean(s[0] for s in seeds):.1f} | {_mean(s[1] for s in seeds):.1f}"
            for arm, seeds in of_shape.items()
        )
        mean, tail = rate_ratios(of_shape)
        yield f"     G / {mean[0]} {shown(mean[1])} | G / {tail[0]} {shown(tail[1])}"


def _pair(mean_s: float, p99_s: float) -> str:
    return f"{1e3 * mean_s:.0f}/{1e3 * p99_s:.0f}"


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
