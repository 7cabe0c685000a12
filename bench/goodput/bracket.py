"""Which rate to run next, so that few runs tell where attainment crosses the goal, and how closely
that is known by then. Pure."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from bench.goodput.twin import Twin
from nodeserve.plan.goodput import CONFIDENCE, GOAL, Tally, crossing, falling

STEP = 1.15  # from a rate to the next while all attain, or none
LEAST_RUNS = 4
MOST_RUNS = 6
CLOSE = 0.2  # of the goodput: so wide may its interval be when enough is known
NUM_DRAWS = 500
BATCHES = 10  # that a run is cut into, to see how much its requests share


class Run(NamedTuple):
    """Which requests were good at a rate, in the order in which they were due, and which of them in
    the simulator; None: nobody asked it."""

    rate: float
    good: tuple[bool, ...]
    twin: Twin | None = None

    @property
    def attained(self) -> float:
        return sum(self.good) / len(self.good)

    @property
    def share(self) -> float:
        """Attained, less what the draw did to it."""
        luck = self.twin.luck if self.twin is not None else 0.0
        return min(1.0, max(0.0, self.attained - luck))

    @property
    def surprises(self) -> list[int]:
        """1 for a request that was good and should not have been, -1 for the reverse; what was
        good, 1, where nobody knows what should have been."""
        expected = self.twin.good if self.twin is not None else (False,) * len(self.good)
        return [good - other for good, other in zip(self.good, expected, strict=True)]


class Point(NamedTuple):
    """What is known at a rate, of all its runs."""

    rate: float
    num_requests: float
    share: float


class Known(NamedTuple):
    """A goodput in requests a second and where it lies with CONFIDENCE. `low` 0: perhaps below
    every rate that was run; `high` infinite: perhaps above."""

    goodput: float
    low: float
    high: float

    @property
    def is_close(self) -> bool:
        return self.low > 0.0 and self.high - self.low <= CLOSE * self.goodput


@dataclass(slots=True)
class Bracket:
    """Begins at `guess`, in requests a second; goes up or down until one rate attains the goal and
    one does not, and then asks for what is least known, until all is."""

    guess: float
    runs: list[Run] = field(default_factory=list)

    def next_rate(self) -> float | None:
        """None: enough is known, or this leads nowhere."""
        if not self.runs:
            return self.guess
        num_runs = len(self.runs)
        if num_runs >= MOST_RUNS:
            return None
        curve, known = self.curve, self.known
        if num_runs >= LEAST_RUNS and known.is_close:
            return None
        lowest, highest = curve[0][0], curve[-1][0]
        if known.goodput == 0.0 or (self.bracketed and known.low == 0.0):
            return lowest / STEP
        if not self.bracketed or known.high == math.inf:
            return highest * STEP
        return round(known.goodput, 3)

    def add(self, rate: float, good: Sequence[bool], twin: Twin | None = None) -> None:
        """A run; runs at one rate count together."""
        self.runs.append(Run(rate, tuple(good), twin))

    @property
    def tallies(self) -> list[tuple[float, Tally]]:
        """What was counted at each rate, by rate."""
        rates = sorted({run.rate for run in self.runs})
        goods = [
            [good for run in self.runs if run.rate == rate for good in run.good] for rate in rates
        ]
        return [
            (rate, Tally(len(good), sum(good))) for rate, good in zip(rates, goods, strict=True)
        ]

    @property
    def points(self) -> list[Point]:
        """By rate, less what the draws did."""
        points = []
        for rate, tally in self.tallies:
            runs = [run for run in self.runs if run.rate == rate]
            good = sum(len(run.good) * run.share for run in runs)
            points.append(Point(rate, tally.num_offered, good / tally.num_offered))
        return points

    @property
    def curve(self) -> list[tuple[float, float]]:
        """(Rate, attainment), by rate, less what the draws did."""
        return [(rate, share) for rate, _, share in self.points]

    @property
    def goodput(self) -> float:
        """Requests a second; 0 where no rate attains the goal, the highest rate where all do."""
        return crossing(_line(self.points)) or 0.0

    @property
    def bracketed(self) -> bool:
        """Whether a rate attains the goal and another does not."""
        attained = [share >= GOAL for _, share in self.curve]
        return any(attained) and not all(attained)

    @property
    def known(self) -> Known:
        found = sorted(self.draws())
        cut = round((1.0 - CONFIDENCE) / 2 * len(found))
        lowest, highest = self.curve[0][0], self.curve[-1][0]
        return Known(self.goodput, min(found[cut], highest), max(found[-1 - cut], lowest))

    def draws(self, seed: int = 0) -> list[float]:
        """Goodputs that the runs allow, each as likely as the next: at every rate a share is drawn
        by Jeffreys' rule, of as many requests as would say as much if they were independent, and
        the line through the shares is asked where it crosses the goal."""
        rng, alike = random.Random(seed), clumping(self.runs)
        points = [point._replace(num_requests=point.num_requests / alike) for point in self.points]
        return [_drawn(rng, points) for _ in range(NUM_DRAWS)]


def _drawn(rng: random.Random, points: Sequence[Point]) -> float:
    drawn = []
    for _, num, share in points:
        drawn.append(rng.betavariate(num * share + 0.5, num * (1.0 - share) + 0.5))
    line = _line([point._replace(share=one) for point, one in zip(points, drawn, strict=True)])
    return math.inf if line[-1][1] >= GOAL else crossing(line) or 0.0


def _line(points: Sequence[Point]) -> list[tuple[float, float]]:
    """(Rate, share), never rising with the rate."""
    weights = [
        (point, round(1000 * point.num_requests)) for point in points
    ]  # shares are no counts
    return falling((point.rate, Tally(num, round(num * point.share))) for point, num in weights)


def clumping(runs: Sequence[Run]) -> float:
    """How many requests say as much as one independent one, 1 at least: requests of a run share its
    queues, so misses come together. By how much more the surprises of a run's tenths differ than
    its shares would by chance, over all runs."""
    seen = by_chance = 0.0
    for run in runs:
        size = len(run.good) // BATCHES
        if size == 0:
            continue
        used = BATCHES * size
        parts = [run.surprises[place : place + size] for place in range(0, used, size)]
        middle = sum(map(sum, parts)) / used
        seen += size * sum((sum(part) / size - middle) ** 2 for part in parts)
        mean = sum(run.good[:used]) / used
        by_chance += (BATCHES - 1) * mean * (1.0 - mean)
    return max(1.0, seen / by_chance) if by_chance else 1.0


def surely_best(brackets: Mapping[str, Bracket]) -> str | None:
    """The one whose goodput is above all others with CONFIDENCE; None: the runs do not tell."""
    drawn = {name: one.draws(seed) for seed, (name, one) in enumerate(brackets.items())}
    best = max(brackets, key=lambda name: brackets[name].goodput)
    others = [draws for name, draws in drawn.items() if name != best]
    if brackets[best].goodput <= 0.0 or not all(_above(drawn[best], other) for other in others):
        return None
    return best


def _above(first: Sequence[float], second: Sequence[float]) -> bool:
    num = sum(one > other for one, other in zip(first, second, strict=True))
    return num >= (0.5 + CONFIDENCE / 2) * len(first)
