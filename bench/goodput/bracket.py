"""Which rate to run next, so that few runs tell where attainment crosses the goal. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from nodeserve.plan.goodput import GOAL, Tally, crossing

STEP = 1.15  # from a rate to the next while all attain, or none
LEAST_RUNS = 4
MOST_RUNS = 9


@dataclass(slots=True)
class Bracket:
    """Begins at `guess`, in requests a second; goes up or down until one rate attains the goal and
    one does not, and then asks once more where the line between them crosses it."""

    guess: float
    tallies: dict[float, Tally] = field(default_factory=dict)
    num_runs: int = 0

    def next_rate(self) -> float | None:
        """None: enough is known, or this leads nowhere."""
        if not self.tallies:
            return self.guess
        if self.num_runs >= MOST_RUNS:
            return None
        curve = self.curve
        if all(share >= GOAL for _, share in curve):
            return curve[-1][0] * STEP
        if all(share < GOAL for _, share in curve):
            return curve[0][0] / STEP
        if self.num_runs >= LEAST_RUNS:
            return None
        return round(self.goodput, 3)

    def add(self, rate: float, tally: Tally) -> None:
        """A run; runs at one rate count together."""
        known = self.tallies.get(rate, Tally(0, 0))
        self.tallies[rate] = Tally(
            known.num_offered + tally.num_offered, known.num_good + tally.num_good
        )
        self.num_runs += 1

    @property
    def curve(self) -> list[tuple[float, float]]:
        """(Rate, attainment), by rate."""
        return [(rate, tally.share) for rate, tally in sorted(self.tallies.items())]

    @property
    def goodput(self) -> float:
        """Requests a second; 0 where no rate attains the goal."""
        return crossing(self.curve) or 0.0

    @property
    def bracketed(self) -> bool:
        """Whether a rate attains the goal and another does not."""
        attained = [share >= GOAL for _, share in self.curve]
        return any(attained) and not all(attained)


def clear_winner(goodputs: Mapping[str, float], apart: float) -> str | None:
    """The one ahead of all others by the share `apart` at least; None if there is none."""
    best = max(goodputs, key=lambda name: goodputs[name])
    others = [rate for name, rate in goodputs.items() if name != best]
    return best if all(goodputs[best] >= (1.0 + apart) * rate for rate in others) else None
