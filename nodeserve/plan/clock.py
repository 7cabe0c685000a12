"""Virtual time: what happens, in the order of its moment and then of its announcement."""

import heapq
from collections.abc import Callable
from math import inf
from typing import Any


class Clock:
    """A heap of things to do."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._count = 0

    def at(self, when_s: float, act: Callable[[Any], None], what: Any = None) -> None:
        """Call `act(what)` then; never in the past."""
        assert when_s >= self.now_s, (when_s, self.now_s)
        self._count += 1
        heapq.heappush(self._heap, (when_s, self._count, act, what))

    def after(self, delay_s: float, act: Callable[[Any], None], what: Any = None) -> None:
        self.at(self.now_s + delay_s, act, what)

    @property
    def next_s(self) -> float:
        """When something happens next; infinite: never."""
        return self._heap[0][0] if self._heap else inf

    def clear(self) -> None:
        """Nothing of what was announced will happen."""
        self._heap.clear()

    def advance(self) -> bool:
        """Go to the next moment at which something happens; False: nothing will."""
        if not self._heap:
            return False
        self.now_s = self._heap[0][0]
        return True

    def act(self) -> bool:
        """Do everything that happens at this moment; False if there was nothing."""
        heap, now_s = self._heap, self.now_s
        if not heap or heap[0][0] > now_s:
            return False
        while heap and heap[0][0] <= now_s:
            _, _, act, what = heapq.heappop(heap)
            act(what)
        return True
