"""When to plan the step behind the one that runs.

Launched too early, the next step misses newcomers that arrive while this one still runs, and they
wait for one step more. Launched too late, the device has nothing to do. So the time to plan is the
expected end of the running step, less a lead in which planning and launching surely fit.

- The expected end is the shortest of the last steps of a similar size: contexts grow and shrink and
  stragglers happen, and an early plan costs little while a late one leaves a gap.
- Sizes are similar when they are equal up to 8 and in the same multiple of 8 above: a device pads
  its batches in about these steps. Where no such step was seen, the next smaller size stands in: it
  takes no longer. Where none was, the plan is due at once.
- The lead is twice the longest of the last launches, and never below `LEAST_LEAD_S`, which covers
  the wake-up of a sleeping process.

Times come in as arguments, in seconds on one monotonic clock.
"""

from bisect import bisect_right
from collections import deque

NUM_STEPS = 8  # remembered for each size
NUM_LAUNCHES = 16
LEAST_LEAD_S = 0.5e-3
MARGIN = 2.0


def size_class(num_seqs: int) -> int:
    """The largest batch that counts as similar."""
    return num_seqs if num_seqs <= 8 else -(-num_seqs // 8) * 8


class Pacer:
    """What decode steps and launches took lately."""

    def __init__(self) -> None:
        self._steps: dict[int, deque[float]] = {}
        self._sizes: list[int] = []  # keys of `_steps`, sorted
        self._launches: deque[float] = deque(maxlen=NUM_LAUNCHES)

    def ended(self, num_seqs: int, seconds: float) -> None:
        """A step of `num_seqs` decodes and nothing else took so long."""
        size = size_class(num_seqs)
        if size not in self._steps:
            self._steps[size] = deque(maxlen=NUM_STEPS)
            self._sizes = sorted(self._steps)
        self._steps[size].append(seconds)

    def launched(self, seconds: float) -> None:
        """Planning and launching a step took so long."""
        self._launches.append(seconds)

    @property
    def lead_s(self) -> float:
        return max(LEAST_LEAD_S, MARGIN * max(self._launches, default=0.0))

    def expected_s(self, num_seqs: int) -> float:
        """What a step of `num_seqs` decodes will take at least; 0 where nothing is known."""
        place = bisect_right(self._sizes, size_class(num_seqs))
        return min(self._steps[self._sizes[place - 1]]) if place else 0.0

    def due_s(self, began_s: float, num_seqs: int) -> float:
        """When to plan the step behind one of `num_seqs` decodes that began at `began_s`."""
        return began_s + max(0.0, self.expected_s(num_seqs) - self.lead_s)
