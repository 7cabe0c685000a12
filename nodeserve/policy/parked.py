"""Prefilled requests that wait for room on the decode side."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple

from nodeserve.policy.decode_allocation import DecodeAllocator, ReadyKv
from nodeserve.policy.units import Unit

MAX_ROUND = 256  # requests that are placed together


class _Place(NamedTuple):
    key: tuple[int, int]
    ready: ReadyKv


_BY_KEY = itemgetter(0)


class ParkedQueue:
    """Highest priority first, then the earliest arrival.

    Request ids rise with arrival, so one that is parked again keeps its place. O(log n), and a move
    of pointers, for each operation.
    """

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._keys: dict[int, tuple[int, int]] = {}  # by request id

    def __len__(self) -> int:
        return len(self._places)

    def push(self, ready: ReadyKv, priority: int) -> None:
        assert ready.request_id not in self._keys
        key = self._keys[ready.request_id] = (-priority, ready.request_id)
        insort(self._places, _Place(key, ready), key=_BY_KEY)

    def first(self, count: int) -> list[ReadyKv]:
        """The next ones; they stay."""
        return [place.ready for place in self._places[:count]]

    def remove(self, request_id: int) -> None:
        """Take a request out if it waits here."""
        if (key := self._keys.pop(request_id, None)) is not None:
            del self._places[bisect_left(self._places, key, key=_BY_KEY)]

    def place(self, allocator: DecodeAllocator, units: Sequence[Unit]) -> Iterator[tuple[int, int]]:
        """Take out those that find room, a round at a time and more while whole rounds have any:
        request ids and their units' indices. O(MAX_ROUND) while there is no room, however many
        wait."""
        more = bool(self._places)
        while more:
            ready = self.first(MAX_ROUND)
            placed = [
                (one.request_id, unit)
                for one, unit in allocator.place(ready, units)
                if unit is not None
            ]
            for request_id, unit in placed:
                self.remove(request_id)
                yield request_id, unit
            more = len(ready) == MAX_ROUND and bool(placed)
