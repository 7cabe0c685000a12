"""Counters and sliding rates, without a clock of their own."""

from collections import deque
from dataclasses import dataclass, field


class Rate:
    """Events per second over the last `window_s` seconds, in one-second buckets."""

    def __init__(self, window_s: int = 10) -> None:
        self.window_s = window_s
        self.total = 0
        self._buckets: deque[tuple[int, int]] = deque()  # (second, count)

    def add(self, count: int, now_s: float) -> None:
        second = int(now_s)
        self.total += count
        if self._buckets and self._buckets[-1][0] == second:
            count += self._buckets.pop()[1]
        self._buckets.append((second, count))
        self._forget(second)

    def per_s(self, now_s: float) -> float:
        """The mean rate over the window that ends now; 0 when nothing happened in it."""
        self._forget(int(now_s))
        if not self._buckets:
            return 0.0
        covered = min(float(self.window_s), max(1.0, now_s - self._buckets[0][0]))
        return sum(count for _, count in self._buckets) / covered

    def _forget(self, second: int) -> None:
        while self._buckets and self._buckets[0][0] <= second - self.window_s:
            self._buckets.popleft()


@dataclass(slots=True)
class Totals:
    """How requests ended, since the start; `rejected` ones were never accepted."""

    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    rejected: int = 0
    finish_rate: Rate = field(default_factory=Rate)

    def count(self, reason: str, now_s: float) -> None:
        """Count an End by its reason."""
        if reason == "cancelled":
            self.cancelled += 1
        elif reason == "error":
            self.failed += 1
        else:
            self.finished += 1
            self.finish_rate.add(1, now_s)
