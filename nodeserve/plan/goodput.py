"""Goodput: how many of the requests offered meet all their limits, and what that says.

A request counts as good when its time to first token *and* its time per output token (and its time
from end to end, where that has a limit) are within their limits. The share is of all requests that
were offered: whatever was refused, failed or never ended is a miss.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from nodeserve.types import Slo as Slo

GOAL = 0.9  # share of requests that must be good for a rate to count as goodput
CONFIDENCE = 0.95
MAX_CONFIDENCE = 1.0 - 1e-9  # beyond it no interval can be told from 0 to 1


@dataclass(frozen=True, slots=True)
class Tally:
    """Good requests among those offered. `num_unknown` more were to come when the run was ended
    early: the share is without them, the interval holds whatever they would have been."""

    num_offered: int
    num_good: int
    num_unknown: int = 0

    @property
    def num_planned(self) -> int:
        return self.num_offered + self.num_unknown

    @property
    def share(self) -> float:
        """The attainment; nothing offered is nothing attained."""
        return self.num_good / self.num_offered if self.num_offered else 0.0

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Wilson's score interval of the share, for requests that are independent of each other.

        Requests of one run share its queues, so the truth is somewhat wider.
        """
        worst, best = self.num_good, self.num_good + self.num_unknown
        low, _ = _wilson(worst, self.num_planned, confidence)
        _, high = _wilson(best, self.num_planned, confidence)
        return low, high


def _wilson(num_good: int, number: int, confidence: float) -> tuple[float, float]:
    if not number:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, weight = num_good / number, z * z / number
    middle = share + weight / 2
    half = z * math.sqrt(share * (1.0 - share) / number + weight / number / 4)
    low, high = (middle - half) / (1.0 + weight), (middle + half) / (1.0 + weight)
    return max(0.0, low), min(1.0, high)


def falling(tallies: Iterable[tuple[float, Tally]]) -> list[tuple[float, float]]:
    """The attainments (rate, share) that never rise with the rate and are most likely, given what
    was counted: where one rises it was chance, and both are pooled (isotonic regression by pooling
    adjacent violators; Barlow et al. 1972)."""
    groups: list[tuple[list[float], Tally]] = []
    for rate, tally in sorted(tallies, key=lambda one: one[0]):
        rates = [rate]
        while groups and tally.share > groups[-1][1].share:
            earlier, before = groups.pop()
            rates = [*earlier, *rates]
            tally = Tally(before.num_offered + tally.num_offered, before.num_good + tally.num_good)
        groups.append((rates, tally))
    return [(rate, tally.share) for rates, tally in groups for rate in rates]


def crossing(points: Sequence[tuple[float, float]], goal: float = GOAL) -> float | None:
    """Where attainment crosses the goal on its way down, on straight lines between the points.

    `points` are (rate, share) and may come in any order. None where no rate reaches the goal; the
    highest rate where none misses it.
    """
    line = sorted(points)
    last = max((place for place, (_, share) in enumerate(line) if share >= goal), default=None)
    if last is None:
        return None
    if last == len(line) - 1:
        return line[last][0]
    (rate, share), (next_rate, next_share) = line[last], line[last + 1]
    return rate + (share - goal) / (share - next_share) * (next_rate - rate)


def smallest_scale(needed: Sequence[float], goal: float = GOAL) -> float | None:
    """The smallest SLO scale at which the share `goal` of the requests is good.

    `needed` has for each request offered the scale from which on it is good, infinity for one that
    never is. None: no scale is enough.
    """
    line = sorted(needed)
    place = math.ceil(goal * len(line) - 1e-9) - 1
    scale = line[max(0, place)] if line else math.inf
    return scale if math.isfinite(scale) else None


def needed_scale(
    slo: Slo, ttft_s: float | None, tpot_s: float | None, e2e_s: float | None = None
) -> float:
    """The smallest scale of `slo` at which a request with these times is good."""
    scales = [0.0]
    for limit, time_s, always in (
        (slo.ttft_s, ttft_s, True),
        (slo.tpot_s, tpot_s, False),
        (slo.e2e_s, e2e_s, True),
    ):
        if limit is not None and time_s is not None:
            scales.append(time_s / limit)
        elif limit is not None and always:
            return math.inf
    return max(scales)
