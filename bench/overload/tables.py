"""Rows and verdicts."""

from collections.abc import Sequence

from bench.overload.phases import Figures, Span
from bench.watch import Look
from nodeserve.loadgen.measure import Punctuality

WITHIN = 0.10  # of the attainment at the capacity
AT_ONCE_S = 0.050  # P99 of a refusal: a tenth of what the first token may take
MOST_GROWTH_MIB = 4.0
WARM_S = 10.0  # of overload, in which buffers and caches find their size
HEAD = (
    f"{'':16}{'offered/s':>10}{'accepted/s':>11}{'in time':>9}{'good/s':>8}"
    f"{'TTFT P50 P99':>16}{'TPOT P50 P99':>15}{'return P99':>12}{'refused P50 P99':>17}  ms"
)


def row(found: Figures) -> str:
    """One phase."""
    seconds = found.phase.seconds
    ttft, tpot, refused = (
        f"{1e3 * middle:.{digits}f} {1e3 * high:.{digits}f}"
        for (middle, high), digits in ((found.ttft_s, 0), (found.tpot_s, 1), (found.refused_s, 1))
    )
    return (
        f"{found.phase.name:16}{found.num_offered / seconds:10.1f}"
        f"{found.num_accepted / seconds:11.1f}{found.attained:9.1%}{found.good_per_s:8.1f}"
        f"{ttft:>16}{tpot:>15}{1e3 * found.return_s[1]:12.1f}{refused:>17}"
    )


def aims(
    found: Sequence[Figures], looks: Sequence[Look], late: Sequence[Punctuality], flood: Span
) -> list[tuple[str, bool]]:
    """What is promised, and whether it was kept. `found`: before, under and after overload."""
    before, under, after = found
    num_refused = under.num_offered - under.num_accepted
    cpu_share, grown_mib, most_mib, fds = _kernel(looks, flood)
    errors = {code: count for one in found for code, count in one.errors.items()}
    return [
        (
            f"accepted ones in time within {WITHIN:.0%} of the share at the capacity:"
            f" {under.attained:.1%} of {before.attained:.1%}",
            under.attained >= (1 - WITHIN) * before.attained,
        ),
        (
            f"as many good ones a second, within {WITHIN:.0%}:"
            f" {under.good_per_s:.1f} of {before.good_per_s:.1f}",
            under.good_per_s >= (1 - WITHIN) * before.good_per_s,
        ),
        (
            f"refused at once: {num_refused:,} of {under.num_offered:,}"
            f" ({num_refused / max(1, under.num_offered):.1%}), P99 {1e3 * under.refused_s[1]:.1f}"
            f" of {1e3 * AT_ONCE_S:.0f} ms",
            num_refused > 0 and under.refused_s[1] <= AT_ONCE_S,
        ),
        (
            f"each refusal says when to try again: {under.num_without_retry} do not",
            not under.num_without_retry,
        ),
        (f"no other error: {errors or 'none'}", not errors),
        (
            f"the coordinator's memory grows at most {MOST_GROWTH_MIB:g} MiB after {WARM_S:g} s:"
            f" {grown_mib:+.1f}, most {most_mib:.0f} MiB",
            grown_mib <= MOST_GROWTH_MIB,
        ),
        (f"descriptors stay: {fds[0]} to {fds[1]}", fds[0] == fds[1]),
        (
            f"a second later as before, within {WITHIN:.0%}: {after.attained_of_all:.1%}"
            f" of all in time, {before.attained_of_all:.1%} before",
            after.attained_of_all >= (1 - WITHIN) * before.attained_of_all,
        ),
        (
            "clients kept time"
            f" ({'; '.join(reason for one in late for reason in one.reasons) or 'they did'});"
            f" the coordinator was {cpu_share:.0%} busy",
            all(one.valid for one in late),
        ),
    ]


def _kernel(looks: Sequence[Look], flood: Span) -> tuple[float, float, float, tuple[int, int]]:
    """Share of a core, MiB of growth after the first seconds of overload and at most, and the
    least and most descriptors."""
    under = [one for one in looks if one.at_s <= flood.ends_s]
    warm_s = min(WARM_S, flood.ends_s / 2)
    warm = [one for one in looks if one.at_s >= warm_s]
    cpu_share = (under[-1].cpu_s - under[0].cpu_s) / max(1e-9, under[-1].at_s - under[0].at_s)
    grown = max(one.rss_bytes for one in warm) - warm[0].rss_bytes
    counts = [one.num_fds for one in looks]
    most = max(one.rss_bytes for one in looks)
    return cpu_share, grown / 2**20, most / 2**20, (min(counts), max(counts))


def values(found: Figures) -> dict[str, object]:
    """For the JSON line; times in ms."""

    def ms(pair: tuple[float, float]) -> list[float]:
        return [round(1e3 * one, 2) for one in pair]

    return {
        "phase": found.phase.name,
        "seconds": round(found.phase.seconds, 1),
        "offered": found.num_offered,
        "accepted": found.num_accepted,
        "good": found.num_good,
        "attained": round(found.attained, 4),
        "good_per_s": round(found.good_per_s, 2),
        "ttft_p50_p99_ms": ms(found.ttft_s),
        "tpot_p50_p99_ms": ms(found.tpot_s),
        "return_p50_p99_ms": ms(found.return_s),
        "refused_p50_p99_ms": ms(found.refused_s),
        "without_retry_after": found.num_without_retry,
        "errors": found.errors,
    }
