"""Whether memory grows: a process's first quarter is its warming up, the rest is compared."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from bench.soak.ledger import Second

FROM, WINDOW = 0.25, 0.10  # shares of a process's time: where to begin, and how much to look at
LEAST_S = 120  # a shorter life says nothing
MOST = 0.01  # of what it was


class Growth(NamedTuple):
    """Of one process, in bytes: medians over a tenth of its time, early and late."""

    pid: int
    seconds: int
    early: float
    late: float

    @property
    def share(self) -> float:
        return self.late / self.early - 1.0


def growths(seconds: Sequence[Second]) -> list[Growth]:
    """Of all processes that lived for LEAST_S or more, the coordinator's first."""
    series: dict[int, list[int]] = {}
    for second in seconds:
        for pid, rss_bytes in second.rss_bytes.items():
            series.setdefault(pid, []).append(rss_bytes)
    found = []
    for pid, values in series.items():
        if len(values) < LEAST_S:
            continue
        begin, window = int(FROM * len(values)), int(WINDOW * len(values))
        early = statistics.median(values[begin : begin + window])
        found.append(Growth(pid, len(values), early, statistics.median(values[-window:])))
    return found
