"""Counters, sliding rates and quantiles, without a clock of their own."""

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

PER_OCTAVE = 8  # places of a time in a histogram: two neighbours are 9 % apart
LEAST_S = 1e-4  # of the first place
Key = str | tuple[str, int]


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


class Sliding:
    """Counts by key over the last `span_s` seconds, in buckets of `bucket_s`: `counts`, and each
    bucket with its number. A bucket is added once and taken off once, whatever is asked."""

    def __init__(self, span_s: int, bucket_s: int = 1) -> None:
        self.span_s = span_s
        self.bucket_s = bucket_s
        self.counts: Counter[Key] = Counter()
        self.buckets: deque[tuple[int, Counter[Key]]] = deque()

    def add(self, counts: Mapping[Key, int], now_s: float) -> None:
        """Add what was counted within the bucket that is now."""
        number = int(now_s // self.bucket_s)
        if not self.buckets or self.buckets[-1][0] != number:
            self.forget(now_s)
            self.buckets.append((number, Counter()))
        self.buckets[-1][1].update(counts)
        self.counts.update(counts)

    def forget(self, now_s: float) -> None:
        """Drop what is older than the span; call it before a look at `counts`."""
        oldest = int(now_s // self.bucket_s) - self.span_s // self.bucket_s
        while self.buckets and self.buckets[0][0] <= oldest:
            for key, count in self.buckets.popleft()[1].items():
                self.counts[key] -= count
                if not self.counts[key]:
                    del self.counts[key]

    def covered_s(self, now_s: float, started_s: float) -> float:
        """Seconds that `counts` are of, if counting began then; one at least."""
        since_s = self.span_s - self.bucket_s + now_s % self.bucket_s
        return max(1.0, min(since_s, now_s - started_s))


def place_of(seconds: float) -> int:
    """A time's place in a histogram with PER_OCTAVE places for each doubling."""
    if seconds <= LEAST_S:
        return 0
    return math.ceil(PER_OCTAVE * math.log2(seconds / LEAST_S))


def highest_s(place: float) -> float:
    """The longest time of a place; of half a place less, its middle."""
    return LEAST_S * math.exp2(place / PER_OCTAVE)


def places(counts: Mapping[Key, int], name: str) -> dict[int, int]:
    """Of counts by (name, place), those of one name: counts by place, ascending."""
    found = {key[1]: n for key, n in counts.items() if isinstance(key, tuple) and key[0] == name}
    return dict(sorted(found.items()))


def quantile_s(histogram: Mapping[int, int], share: float) -> float | None:
    """The time that so many do not exceed, from counts by ascending place, to within 5 %; None:
    there is none."""
    wanted = share * sum(histogram.values())
    for place, count in histogram.items():
        wanted -= count
        if wanted <= 1e-9:
            return highest_s(place - 0.5)
    return None


@dataclass(slots=True)
class Totals:
    """How requests ended, since the start; `rejected` ones were never accepted."""

    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    rejected: int = 0
    finish_rate: Rate = field(default_factory=Rate)

    def count(self, reason: str, now_s: float) -> str:
        """Count an End by its reason; which of the first three it is."""
        if reason == "cancelled":
            self.cancelled += 1
            return "cancelled"
        if reason == "error":
            self.failed += 1
            return "failed"
        self.finished += 1
        self.finish_rate.add(1, now_s)
        return "finished"
