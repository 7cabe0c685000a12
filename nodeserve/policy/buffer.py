"""Requests that wait for a departure, in the order in which they are considered for one.

Higher priority first; of the same priority those that can still meet their SLO before best effort;
of these whoever an earlier departure left behind, by arrival, where a prompt counts as if it had
come later by LATER times the time that its tokens take. So short prompts pass a long one, which
costs it little and saves them much, but only those that come soon after it: nobody is overtaken for
ever by others of its class. Newcomers follow: longest first where the next departure is near, since
the gaps that long prompts leave are filled by short ones and not the other way round, else in the
same order as those left behind. Every operation is O(log n) amortised, a request being entered
twice at most, but for what keeps `tokens_ahead`, which moves and adds whole numbers in O(n).
"""

import heapq
import math
from bisect import bisect_left, bisect_right
from collections import defaultdict

from nodeserve.policy.units import Waiting

_Class = tuple[int, bool]
_Key = tuple[int, bool, bool, float, int]
_Place = tuple[float, int]  # order, request id
# Of requests with a TTFT limit 4 serves 11 % more in time than 1 does, and 8 no more still.
LATER = 4.0
MAX_STALE = 64  # entries of requests that are gone, beyond as many as really wait


class Buffer:
    """A heap with lazy removal. `token_s`: seconds that a prompt token takes, kept up by the owner;
    what is in the buffer keeps the one it was entered with."""

    def __init__(self, longest_first: bool) -> None:
        self.longest_first = longest_first  # among newcomers
        self.token_s = 0.0
        self.num_tokens = 0  # prompt tokens of all
        self._waiting: dict[int, Waiting] = {}  # in the order in which they came
        self._heap: list[_Key] = []
        self._keys: dict[int, _Key] = {}  # the valid entry of each
        self._fresh: dict[int, Waiting] = {}  # came since the last departure
        self._hidden: set[int] = set()
        self._lines: defaultdict[_Class, _Line] = defaultdict(_Line)
        self._places: dict[int, _Place] = {}
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
        place = self._places[request_id] = self._order(waiting), request_id
        self._lines[class_of(waiting)].add(place, waiting.num_tokens)
        if not waiting.rounds:
            self._fresh[request_id] = waiting
        self._enter(waiting)

    def remove(self, request_id: int) -> Waiting | None:
        """Take a request out, its rounds counted; None if it does not wait here."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is None:
            return None
        waiting.rounds = self.rounds_of(waiting)
        self._fresh.pop(request_id, None)
        del self._keys[request_id], self._before[request_id]
        self.num_tokens -= waiting.num_tokens
        self._lines[class_of(waiting)].remove(self._places.pop(request_id))
        self._hidden.discard(request_id)
        if len(self._heap) > 2 * len(self._keys) + MAX_STALE:
            self._heap = [key for key in self._keys.values() if key[-1] not in self._hidden]
            heapq.heapify(self._heap)
        return waiting

    def first(self) -> Waiting | None:
        """The next to be considered; it stays."""
        heap = self._heap
        while heap and self._keys.get(heap[0][-1]) is not heap[0]:
            heapq.heappop(heap)
        return self._waiting[heap[0][-1]] if heap else None

    def hide(self, num_tokens: int) -> list[Waiting]:
        """The first requests, up to the one that makes them `num_tokens` or more: they stay, but
        are not considered again until each is shown or removed."""
        hidden: list[Waiting] = []
        while num_tokens > 0 and (waiting := self.first()) is not None:
            heapq.heappop(self._heap)
            self._hidden.add(waiting.request_id)
            hidden.append(waiting)
            num_tokens -= waiting.num_tokens
        return hidden

    def show(self, waiting: Waiting) -> None:
        self._hidden.remove(waiting.request_id)
        heapq.heappush(self._heap, self._keys[waiting.request_id])

    def departed(self) -> None:
        """A batch has left: whoever is still here was left behind."""
        self._departures += 1
        fresh, self._fresh = self._fresh, {}
        if self.longest_first:
            for waiting in fresh.values():
                self._enter(waiting)

    def rounds_of(self, waiting: Waiting) -> int:
        """Departures that have left it behind."""
        return self._departures - self._before[waiting.request_id]

    def oldest_arrival_s(self) -> float:
        """The arrival of the request that has been here longest."""
        return next(iter(self._waiting.values())).arrived_s

    def tokens_ahead(self, waiting: Waiting) -> int:
        """Prompt tokens that are considered before a newcomer like this one, newcomers taken by
        their arrival as those left behind are. O(n), but a sum of whole numbers."""
        own, order = class_of(waiting), self._order(waiting)
        return sum(
            line.tokens_until(order if kind == own else math.inf)
            for kind, line in self._lines.items()
            if kind <= own
        )

    def _enter(self, waiting: Waiting) -> None:
        newcomer = self.longest_first and waiting.request_id in self._fresh
        order = -float(waiting.num_tokens) if newcomer else self._order(waiting)
        key = (*class_of(waiting), newcomer, order, waiting.request_id)
        self._keys[waiting.request_id] = key
        heapq.heappush(self._heap, key)

    def _order(self, waiting: Waiting) -> float:
        return waiting.arrived_s + LATER * self.token_s * waiting.num_tokens


class _Line:
    """The requests of one class by their order, with their prompt tokens."""

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._tokens: list[int] = []

    def add(self, place: _Place, num_tokens: int) -> None:
        at = bisect_left(self._places, place)
        self._places.insert(at, place)
        self._tokens.insert(at, num_tokens)

    def remove(self, place: _Place) -> None:
        at = bisect_left(self._places, place)
        del self._places[at], self._tokens[at]

    def tokens_until(self, order: float) -> int:
        return sum(self._tokens[: bisect_right(self._places, (order, math.inf))])


def class_of(waiting: Waiting) -> _Class:
    """What goes before arrival; lower is earlier."""
    return (-waiting.priority, waiting.best_effort)
