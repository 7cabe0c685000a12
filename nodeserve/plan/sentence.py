"""When a run has said whether enough of its requests are good: it need not go on.

It is certain once so many have missed that the goal is out of reach even if all the rest were
good, and once so many were good that it is reached even if none of the rest were: what is left then
are the longest answers, which may take as long as all the others. Who wants to be sure of more than
this one run asks for a confidence, and certainty takes more of both then.

A run that only has to show on which side of the goal it is ends earlier: when of those that have
come far too many have missed already. Queues grow as long as a run lasts, so it will not become
better. That many were good so far says nothing of the kind: an instance with much memory serves
the first thousands well at any rate.
"""

from math import floor, sqrt

from nodeserve.plan.goodput import Tally

SPREADS = 5.0  # standard deviations of the misses, above those that the goal allows: they bunch
LEAST_BAD = 30  # misses before that says anything


class Sentence:
    """Of a run with `num_requests` that count. `confidence` None: its own outcome is enough."""

    def __init__(self, goal: float, num_requests: int, confidence: float | None = None) -> None:
        self.is_over = False
        self._goal = goal
        self._num_requests = num_requests
        self._most_bad, self._least_good = bounds(goal, num_requests, confidence)
        self._foresees = confidence is None
        self._num_good = self._num_bad = 0

    def note(self, missed: bool, num_come: int) -> None:
        """A request that counts has ended; so many have come."""
        if missed:
            self._num_bad += 1
            self.is_over |= self._num_bad > self._most_bad or self._is_lost(num_come)
        else:
            self._num_good += 1
            self.is_over |= self._num_good >= self._least_good

    @property
    def tally(self) -> Tally:
        """What has been noted."""
        num_judged = self._num_good + self._num_bad
        # Requests that come together with the first or the last that counts are noted as well.
        return Tally(num_judged, self._num_good, max(0, self._num_requests - num_judged))

    def _is_lost(self, num_come: int) -> bool:
        if not self._foresees or self._num_bad < LEAST_BAD:
            return False
        allowed = (1.0 - self._goal) * min(num_come, self._num_requests)
        return self._num_bad > allowed + SPREADS * sqrt(self._goal * allowed)


def bounds(goal: float, num_requests: int, confidence: float | None) -> tuple[int, int]:
    """How many of a run may miss before it is known to fail the goal, and how many have to be good
    before it is known to reach it; with this confidence, if there is one: more of both then."""
    most_bad = floor((1.0 - goal) * num_requests + 1e-9)
    least_good = num_requests - most_bad
    if confidence is None:
        return most_bad, least_good

    def interval(num_good: int) -> tuple[float, float]:
        return Tally(num_requests, num_good).interval(confidence)

    while most_bad < num_requests - 1 and interval(num_requests - most_bad - 1)[1] >= goal:
        most_bad += 1
    while least_good <= num_requests and interval(least_good)[0] < goal:
        least_good += 1
    return most_bad, least_good
