"""Passes of which nothing comes but tokens: nobody begins in them, and nobody ends.

Nothing has to be decided for them unless somebody waits, so they take no turn of the node: they
end, and are told, in the order of their times, until something else happens. Most passes of a
simulation are such, hence the short ways here.
"""

import heapq
from collections import deque
from collections.abc import Callable
from math import inf

from nodeserve.plan.instances import Instance, QuietDone


class QuietPasses:
    """`ended` is told of instances whose pass is over, `told` of the words about it, which arrive
    `message_s` later."""

    def __init__(
        self,
        message_s: float,
        ended: Callable[[Instance], None],
        told: Callable[[Instance, QuietDone], None],
    ) -> None:
        self._message_s = message_s
        self._ended = ended
        self._told = told
        self._running: list[tuple[float, int, Instance]] = []  # a heap, by their ends
        self._num_begun = 0
        self._words: deque[tuple[float, Instance, QuietDone]] = deque()  # on their way

    @property
    def next_s(self) -> float:
        """When something happens next; infinite: never."""
        running, words = self._running, self._words
        if not running:
            return words[0][0] if words else inf
        next_s = running[0][0]
        return words[0][0] if words and words[0][0] < next_s else next_s

    def begin(self, ends_s: float, instance: Instance) -> None:
        """A pass runs."""
        self._num_begun += 1
        heapq.heappush(self._running, (ends_s, self._num_begun, instance))

    def act(self, now_s: float) -> None:
        """Everything that happens until then."""
        running, words = self._running, self._words
        while running and running[0][0] <= now_s:
            instance = heapq.heappop(running)[2]
            if instance.alive:
                words.append((now_s + self._message_s, instance, instance.end_quietly()))
                self._ended(instance)
        while words and words[0][0] <= now_s:
            _, instance, done = words.popleft()
            if not instance.lost:
                self._told(instance, done)

    def clear(self) -> None:
        """Nothing of what was to come will happen."""
        self._running.clear()
        self._words.clear()
