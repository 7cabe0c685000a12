"""How much a plan simulates."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is simulated: requests a run, and layouts of a kind that are looked at closely."""

    coarse_requests: int  # at least
    fine_requests: int  # likewise
    most_requests: int  # in any run
    finalists: int
    tolerance: float
    moves: int  # changes around the best, one after the other
    every: bool = False  # also layouts that share their slower phase with one that was run


EFFORTS = {
    "quick": Effort(150, 300, 4000, 1, 0.08, 1),
    "normal": Effort(200, 500, 8_000, 2, 0.05, 1),
    "thorough": Effort(500, 2000, 50_000, 5, 0.02, 6, every=True),
}
