"""When the next batch may leave: departures staggered over the prefill instances.

A pass takes nobody in once it runs, so a request waits for an instance to come free. Departures one
interval apart,

    I = k * (T + L) / N                                                                 (1)

with T the mean pass time, L the dead time between a pass and the one that its end made possible and
N the instances alive, make one come free every I, and the mean wait T / (2 N) where dispatch on
arrival has T / 2 (Staggered Batch Scheduling, arXiv 2512.16134, as its digests report it).

The interval is an upper bound. What counts is that departures are evenly apart, and pass times
differ: so with s seconds since the last departure, and u_j until the j-th of the other instances
comes free, a batch leaves as soon as

    s >= k * max over j of u_j / j                                                      (2)

since then the others can go on at the distance that it keeps. With equal pass times that is formula
(1) again; where the others are free it is at once. So it is where few come: holding n requests for
d seconds costs n * d, and saves rate * d requests about the wait for the next instance, so holding
pays no more once

    n >= c * k * rate * max over j of u_j / j                                           (3)

which counts where the right side, the arrivals to be expected, is FEW at most: of many, the number
says no more about the load than s does, and is noisier. Below 1, c gives up some spacing for not
holding at loads where holding hardly pays; what is here measured best (bench/LOG.md).

All this takes a pass's time as given. Where it follows what boards, waiting makes the batch larger,
the pass longer and the gain smaller; passes that differ come free at different times by themselves.
So k is scaled by how constant pass times are (Constancy): from 1 down to 0, late binding alone.

A full batch leaves at once, and so does one whose oldest request has waited MAX_AGE_PASSES passes.
"""

import math
from dataclasses import dataclass

MAX_AGE_PASSES = 2.0  # no timer holds an older request
ALPHA = 0.1  # weight of the latest sample in moving means
RATE_PASSES = 8.0  # the arrival rate is that of the last so many mean passes
MIN_RATE_SPAN_S = 0.5
CONSTANCY_PASSES = 64  # passes that Constancy remembers, about
VARIES, STAYS = 0.2, 0.55  # constancy up to which k is 0, and from which it is as asked for
ENOUGH, FEW = 0.5, 8.0  # of formula (3): c, and expected arrivals up to which it counts


@dataclass(slots=True)
class Mean:
    """An exponentially weighted mean; the first sample stands for all before it."""

    value: float = 0.0
    empty: bool = True

    def add(self, sample: float) -> None:
        weight = 1.0 if self.empty else ALPHA
        self.value += weight * (sample - self.value)
        self.empty = False


class Constancy:
    """How little a pass's time depends on what boards it: 1 not at all, 0 in proportion.

    One less the elasticity of the time in the number of tokens, from the line through the last
    passes, forgetting exponentially.
    """

    def __init__(self) -> None:
        self._weight = 0.0
        self._tokens = self._seconds = 0.0  # means
        self._variance = self._covariance = 0.0  # sums of weighted products

    def add(self, num_tokens: int, seconds: float) -> None:
        keep = 1.0 - 1.0 / CONSTANCY_PASSES
        self._weight = keep * self._weight + 1.0
        off_tokens, off_seconds = num_tokens - self._tokens, seconds - self._seconds
        self._tokens += off_tokens / self._weight
        self._seconds += off_seconds / self._weight
        self._variance = keep * self._variance + off_tokens * (num_tokens - self._tokens)
        self._covariance = keep * self._covariance + off_tokens * (seconds - self._seconds)

    @property
    def share(self) -> float:
        """1 until passes of different sizes have been seen."""
        if self._variance <= 0.0 or self._seconds <= 0.0:
            return 1.0
        slope = self._covariance / self._variance
        return min(1.0, max(0.0, 1.0 - slope * self._tokens / self._seconds))


class ArrivalRate:
    """Requests a second, forgetting exponentially."""

    def __init__(self) -> None:
        self._count = 0.0
        self._last_s = -math.inf

    def add(self, now_s: float, span_s: float) -> None:
        self._count = self._decayed(now_s, span_s) + 1.0
        self._last_s = now_s

    def per_s(self, now_s: float, span_s: float) -> float:
        return self._decayed(now_s, span_s) / span_s

    def _decayed(self, now_s: float, span_s: float) -> float:
        return self._count * math.exp(-max(0.0, now_s - self._last_s) / span_s)


@dataclass(frozen=True, slots=True)
class Moment:
    """What a departure is weighed on."""

    now_s: float
    num_waiting: int
    oldest_arrival_s: float
    is_full: bool
    free_s: list[float]  # when each of the other instances can board, sorted; past: now


class Window:
    """`fixed_s`: an interval that does not adapt; None: formula (1); 0: no timer at all."""

    def __init__(self, fixed_s: float | None, k: float) -> None:
        self.pass_s: float | None = None  # T; None until a pass has ended
        self.dead_s = 0.0  # L
        self.rate = ArrivalRate()
        self.constancy = Constancy()
        self._fixed_s = fixed_s
        self._k = k
        self._last_s = -math.inf

    @property
    def k(self) -> float:
        """The multiplier in force: see the module's head."""
        return self._k * min(1.0, max(0.0, (self.constancy.share - VARIES) / (STAYS - VARIES)))

    def arrived(self, now_s: float) -> None:
        self.rate.add(now_s, self._span_s)

    def departed(self, now_s: float) -> None:
        self._last_s = now_s

    def interval_s(self, num_instances: int) -> float:
        """Seconds between departures; 0 while no pass time is known."""
        if num_instances < 2:
            return 0.0  # one instance has nothing to alternate with: late binding alone
        if self._fixed_s is not None:
            return self._fixed_s
        if self.pass_s is None:
            return 0.0
        return self.k * (self.pass_s + self.dead_s) / num_instances

    def leaves_s(self, moment: Moment) -> float:
        """When a batch should leave if nothing else happens: `now_s` or earlier is now."""
        interval_s = self.interval_s(len(moment.free_s) + 1)
        if not interval_s or moment.is_full:
            return moment.now_s
        due_s = self._last_s + interval_s
        if self.pass_s is not None:
            due_s = min(due_s, moment.oldest_arrival_s + MAX_AGE_PASSES * self.pass_s)
        return min(due_s, self._worth_holding_s(moment))

    def _worth_holding_s(self, moment: Moment) -> float:
        """Formulas (2) and (3); a fixed interval is cut short where all others are free alone."""
        now_s, k = moment.now_s, self.k
        ahead_s = [(free_s - now_s) / j for j, free_s in enumerate(moment.free_s, 1)]
        apart_s = k * max(ahead_s)
        if apart_s <= 0.0:
            return now_s
        if self._fixed_s is not None:
            return math.inf
        expected = self.rate.per_s(now_s, self._span_s) * apart_s
        if expected <= FEW and moment.num_waiting >= ENOUGH * expected:
            return now_s
        since_s = now_s - self._last_s
        # Waiting brings the last departure further away and the next instances closer.
        return now_s + max(
            (k * one_s - since_s) / (1.0 + k / j) for j, one_s in enumerate(ahead_s, 1)
        )

    @property
    def _span_s(self) -> float:
        return max(MIN_RATE_SPAN_S, RATE_PASSES * (self.pass_s or 0.0))
