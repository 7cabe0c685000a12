"""The highest rate at which enough requests are good, by asking: doubling, then bisection.

Knows nothing of who answers: a server under load or a simulation. A probe counts good requests at a
rate; while the interval of its share holds the goal, it is asked again with twice the requests.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from nodeserve.errors import ConfigError
from nodeserve.plan.goodput import CONFIDENCE, GOAL, MAX_CONFIDENCE, Tally

STEP = 2.0


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """`start` is the first rate asked, in requests a second; `low` and `high` bound all. The search
    ends when the rate that passes and the one that does not are within `tolerance`. A probe has
    `min_requests`, or as many as take `min_duration_s`, at first."""

    start: float
    low: float = 0.0
    high: float = math.inf
    goal: float = GOAL
    confidence: float = CONFIDENCE
    tolerance: float = 0.05
    min_requests: int = 200
    min_duration_s: float = 0.0
    max_requests: int = 3200
    max_probes: int = 24
    step: float = STEP  # between rates, until one passes and one does not

    @property
    def look_confidence(self) -> float:
        """Of each look at a rate, so that all of them together err no more than `confidence` says
        (Bonferroni): who looks again while it is not clear has more chances to be misled."""
        num_looks = 1 + math.ceil(math.log2(self.max_requests / self.min_requests))
        return 1.0 - (1.0 - self.confidence) / num_looks

    def __post_init__(self) -> None:
        if not 0.0 < self.start < math.inf or not self.low <= self.start <= self.high:
            raise ConfigError(
                f"a search from {self.low:g} to {self.high:g} requests/s cannot start at"
                f" {self.start:g}: use a rate between them, above 0"
            )
        if not 0.0 < self.goal < 1.0 or not 0.0 < self.confidence <= MAX_CONFIDENCE:
            raise ConfigError("goal and confidence of a search lie between 0 and 1, such as 0.9")
        if not 0.0 < self.tolerance < math.inf or not 0.0 <= self.min_duration_s < math.inf:
            raise ConfigError("a search needs a tolerance above 0, such as 0.05")
        if not 1.0 < self.step < math.inf:
            raise ConfigError("a search needs steps above 1, such as 2")
        if not 1 <= self.min_requests <= self.max_requests or self.max_probes < 1:
            raise ConfigError("a search needs 1 request a probe or more, and 1 probe or more")


@dataclass(frozen=True, slots=True)
class Probe:
    """What a rate gave. `valid` is False when it is unknown what the server would have done, as
    when a client could not send so fast."""

    rate: float
    tally: Tally
    valid: bool = True

    def decided(self, goal: float, confidence: float) -> bool:
        """Whether the interval of the share lies on one side of the goal."""
        low, high = self.tally.interval(confidence)
        return low >= goal or high < goal


@dataclass(frozen=True, slots=True)
class Found:
    """The goodput lies from `rate`, the highest that passed, to `too_high`, the lowest that did
    not. `rate` 0: none passed. `reason` says why the search ended: "found"; "low" or "high", at a
    bound; "invalid", a probe was; "probes", there were too many."""

    rate: float
    too_high: float
    reason: str
    decided: bool  # both ends with the stated confidence, not only by their shares
    probes: list[Probe] = field(default_factory=list)


Ask = Callable[[float, int], Probe]  # rate in requests a second, number of requests


def find_goodput(ask: Ask, options: SearchOptions) -> Found:
    """Search; `ask(rate, num_requests)` is called with ever better rates, one at a time."""
    return _Search(ask, options).run()


class _Search:
    def __init__(self, ask: Ask, options: SearchOptions) -> None:
        self._ask = ask
        self._options = options
        self._probes: list[Probe] = []
        self._passed: Probe | None = None
        self._failed: Probe | None = None

    def run(self) -> Found:
        rate: float | None = self._options.start
        while rate is not None:
            if len(self._probes) >= self._options.max_probes:
                return self._found("probes")
            probe = self._probe(rate)
            if not probe.valid:
                return self._found("invalid")
            if probe.tally.share >= self._options.goal:
                self._passed = probe
            else:
                self._failed = probe
            rate = self._next(rate)
        if self._passed is None:
            return self._found("low")
        return self._found("high" if self._failed is None else "found")

    def _next(self, rate: float) -> float | None:
        """The next rate to ask; None: this is close enough, or the end of what may be asked."""
        options = self._options
        if self._failed is None:
            return None if rate >= options.high else min(options.step * rate, options.high)
        if self._passed is None:
            lowest = options.low or options.start * options.tolerance / 16
            return None if rate <= lowest else max(rate / options.step, lowest)
        low, high = self._passed.rate, self._failed.rate
        return None if high <= low * (1.0 + options.tolerance) else math.sqrt(low * high)

    def _probe(self, rate: float) -> Probe:
        """With more requests while it is not clear on which side of the goal the share lies."""
        options = self._options
        num_requests = max(options.min_requests, math.ceil(rate * options.min_duration_s))
        while True:
            probe = self._ask(rate, num_requests)
            self._probes.append(probe)
            clear = probe.decided(options.goal, options.look_confidence)
            spent = len(self._probes) >= options.max_probes
            if clear or spent or not probe.valid or num_requests >= options.max_requests:
                return probe
            num_requests = min(2 * num_requests, options.max_requests)

    def _found(self, reason: str) -> Found:
        ends = [one for one in (self._passed, self._failed) if one is not None]
        options = self._options
        return Found(
            rate=self._passed.rate if self._passed else 0.0,
            too_high=self._failed.rate if self._failed else math.inf,
            reason=reason,
            decided=all(one.decided(options.goal, options.look_confidence) for one in ends),
            probes=self._probes,
        )
