"""How long a worker may take to start, and in what it is late. Time is an argument.

Each phase has a share of the whole time, counted from its last sign of progress: what stands still
is found long before the whole time is over, and what moves may take all of it. The shares are wide:
a cold disk under `import torch`, kernels that are compiled in the first step.
"""

import math

SHARES = {
    "process": 0.25,  # from its birth to its first word: the interpreter and our own code
    "import": 0.5,
    "warm-up": 1.0,
    "peers": 0.25,  # opening what other workers share
}
SHARE = 0.5  # of any other phase, and of what lies between two
BASE_S, BYTES_PER_S = 240.0, 50e6  # of the time where nobody says it: a slow disk


def default_timeout_s(weight_bytes: int) -> float:
    """For a whole start, by the size of the model."""
    return BASE_S + weight_bytes / BYTES_PER_S


class Start:
    """One worker's start, which may take `timeout_s`. Phases come as they are told."""

    def __init__(self, timeout_s: float, now_s: float) -> None:
        self._timeout_s = timeout_s
        self._began_s = self._moved_s = now_s
        self._phase, self._done, self._total = "process", 0, 1
        self._over = False

    @property
    def deadline_s(self) -> float:
        """Later it is late, unless something moves before. Infinite once it is over."""
        if self._over:
            return math.inf
        limit_s = SHARES.get(self._phase, SHARE) * self._timeout_s
        return min(self._began_s + self._timeout_s, self._moved_s + limit_s)

    def move(self, phase: str, done: int, total: int, now_s: float) -> None:
        """It told of `done` of `total` in a phase; the same again is no move."""
        if (phase, done, total) != (self._phase, self._done, self._total):
            self._phase, self._done, self._total = phase, done, total
            self._moved_s = now_s
            self._over = False

    def finish(self) -> None:
        """It is where it should be."""
        self._over = True

    def pause(self, seconds: float) -> None:
        """Nobody could move, or would have been heard: this time does not count."""
        self._began_s += seconds
        self._moved_s += seconds

    def describe(self, now_s: float) -> str:
        """Where it stands, for people."""
        since = f"since {now_s - self._moved_s:.0f} s"
        where = f"in {self._phase!r}"
        if self._done >= self._total:
            where = f"after {self._phase!r}"
        elif self._done:
            where += f" at {self._done} of {self._total}"
        return f"{where} {since}, started {now_s - self._began_s:.0f} s ago"
