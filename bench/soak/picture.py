"""A run as four curves over time."""

import statistics
from collections.abc import Sequence

from bench.soak.ledger import Second
from bench.window.picture import Axis, Panel, ceiling_for, draw

Line = Sequence[float | None]
BUCKETS = 60  # points of a curve at most
TITLES = {"G": "coordinator / all", "C": "workers' mean", "D": "kills so far", "H": "refused"}


def picture(seconds: Sequence[Second], coordinator: int, title: str) -> str:
    """Memory, throughput, attainment and kills, as SVG."""
    across = Axis("minutes", len(seconds) / 60.0, "")
    each = max(1, len(seconds) // BUCKETS)
    buckets = [seconds[at : at + each] for at in range(0, len(seconds), each)]

    def panel(name: str, highest: float | None = None, **lines: Line) -> Panel:
        points = {
            arm: [
                (at / max(1, len(buckets) - 1), value)
                for at, value in enumerate(values)
                if value is not None
            ]
            for arm, values in lines.items()
        }
        most = max((value for line in points.values() for _, value in line), default=1.0)
        return Panel(name, points, highest or ceiling_for([max(most, 1.0)]), across)

    killed, kills = 0, []
    for bucket in buckets:
        killed += sum(one.kills for one in bucket)
        kills.append(float(killed))
    return draw(
        title,
        TITLES,
        [
            panel(
                "resident memory, MiB",
                G=[_rss(bucket, coordinator, ours=True) for bucket in buckets],
                C=[_rss(bucket, coordinator, ours=False) for bucket in buckets],
            ),
            panel(
                "tokens/s", G=[statistics.fmean(one.tokens for one in bucket) for bucket in buckets]
            ),
            panel(
                "answers in time, % of those that ended well",
                100.0,
                G=[
                    100.0 * sum(one.in_time for one in bucket) / ended
                    if (ended := sum(one.ended for one in bucket))
                    else None
                    for bucket in buckets
                ],
            ),
            panel(
                "workers killed so far, requests refused a second",
                D=kills,
                H=[statistics.fmean(one.refused for one in bucket) for bucket in buckets],
            ),
        ],
        "as the panel says",
    )


def _rss(bucket: Sequence[Second], coordinator: int, *, ours: bool) -> float | None:
    values = [
        rss_bytes / 2**20
        for one in bucket
        for pid, rss_bytes in one.rss_bytes.items()
        if (pid == coordinator) is ours
    ]
    return statistics.fmean(values) if values else None
