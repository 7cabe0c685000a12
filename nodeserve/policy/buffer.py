"""Requests that wait for a departure, in the order in which one takes them.

Higher priority first; of the same priority those that can still meet their SLO before best effort;
of these, whoever an earlier departure left behind by arrival, then newcomers, longest first, which
packs best. So nobody is overtaken for ever by others of its class. Every operation is O(log n)
amortised: a request gets a second entry once, when the first departure leaves it behind.
"""

import heapq
from collections import Counter

from nodeserve.policy.units import Waiting

_Key = tuple[int, bool, bool, float, int]
MAX_STALE = 64  # entries of requests that are gone, beyond as many as really wait


class Buffer:
    """A heap with lazy removal."""

    def __init__(self) -> None:
        self.num_tokens = 0  # prompt tokens of all
        self._waiting: dict[int, Waiting] = {}  # in the order in which they came
        self._keys: dict[int, _Key] = {}  # the valid entry of each
        self._heap: list[_Key] = []
        self._fresh: dict[int, None] = {}  # came since the last departure
        self._class_tokens: Counter[tuple[int, bool]] = Counter()
        self._departures = 0
        self._before: dict[int, int] = {}  # departures before it came, less the rounds it had

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, waiting: Waiting) -> None:
        request_id = waiting.request_id
        assert request_id not in self._waiting, request_id
        self._waiting[request_id] = waiting
        self._before[request_id] = self._departures - waiting.rounds
        self.num_tokens += waiting.num_tokens
        self._class_tokens[_class_of(waiting)] += waiting.num_tokens
        if not waiting.rounds:
            self._fresh[request_id] = None
        self._enter(waiting, waiting.rounds > 0)

    def remove(self, request_id: int) -> Waiting | None:
        """Take a request out, its rounds counted; None if it does not wait here."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is None:
            return None
        del self._keys[request_id]
        self._fresh.pop(request_id, None)
        waiting.rounds = self.rounds_of(waiting)
        del self._before[request_id]
        self.num_tokens -= waiting.num_tokens
        kind = _class_of(waiting)
        self._class_tokens[kind] -= waiting.num_tokens
        if not self._class_tokens[kind]:
            del self._class_tokens[kind]
        if len(self._heap) > 2 * len(self._keys) + MAX_STALE:
            self._heap = list(self._keys.values())
            heapq.heapify(self._heap)
        return waiting

    def first(self) -> Waiting | None:
        """The next to board; it stays."""
        heap = self._heap
        while heap and self._keys.get(heap[0][-1]) is not heap[0]:
            heapq.heappop(heap)
        return self._waiting[heap[0][-1]] if heap else None

    def hide_first(self) -> Waiting:
        """Look behind the first one, which does not fit, until it is shown again."""
        waiting = self.first()
        assert waiting is not None
        heapq.heappop(self._heap)
        return waiting

    def show(self, waiting: Waiting) -> None:
        heapq.heappush(self._heap, self._keys[waiting.request_id])

    def rounds_of(self, waiting: Waiting) -> int:
        """Departures that have left it behind."""
        return self._departures - self._before[waiting.request_id]

    def departed(self) -> None:
        """A batch has left: whoever is still here was left behind."""
        self._departures += 1
        for request_id in self._fresh:
            self._enter(self._waiting[request_id], True)
        self._fresh.clear()

    def oldest_arrival_s(self) -> float:
        """The arrival of the request that has been here longest."""
        return next(iter(self._waiting.values())).arrived_s

    def tokens_ahead(self, waiting: Waiting) -> int:
        """Prompt tokens that board before a newcomer like this one. O(classes)."""
        own = _class_of(waiting)
        return sum(tokens for kind, tokens in self._class_tokens.items() if kind <= own)

    def _enter(self, waiting: Waiting, left_behind: bool) -> None:
        order = waiting.arrived_s if left_behind else -float(waiting.num_tokens)
        key = (*_class_of(waiting), not left_behind, order, waiting.request_id)
        self._keys[waiting.request_id] = key
        heapq.heappush(self._heap, key)


def _class_of(waiting: Waiting) -> tuple[int, bool]:
    return (-waiting.priority, waiting.best_effort)
