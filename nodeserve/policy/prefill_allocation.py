"""Who of an instance's units prefills which request of a departure.

Water-filling: each request goes to the unit with the most room left in the pass that comes, so that
the lowest level rises first and no rank of the instance is waited for more than it must. A prompt
longer than the room makes the level negative: the unit owes the next passes. What counts is what
has to be computed: tokens that a unit has in its prefix cache are taken off there.
"""

import heapq
from collections.abc import Mapping, Sequence

from nodeserve.policy.units import Unit, Waiting

STICKINESS = 0.25  # of a budget: how much fuller a unit may become for the longest cached prefix


class WaterFilling:
    """Levels of one instance's units during one departure. O(log units) per request."""

    def __init__(self, units: Sequence[Unit], rooms: Mapping[int, int], budget: int) -> None:
        """`rooms` has, by unit index, the tokens that still fit the pass that comes; only units in
        it may get something."""
        self._units = {unit.index: unit for unit in units}
        self._rooms = dict(rooms)
        self._budget = budget
        # What a pass of each holds that has no other prompt: running sequences take part in it.
        self._empty_rooms = {
            index: budget - self._units[index].account.load.num_running for index in rooms
        }
        self._smallest = min(self._empty_rooms.values(), default=0)
        self._heap = [self._entry(index) for index in rooms]
        heapq.heapify(self._heap)

    @property
    def room(self) -> int:
        """Tokens that still fit the pass that comes; 0: no unit has room for a single one."""
        return sum(room for room in self._rooms.values() if room > 0)

    def pick(self, waiting: Waiting, max_num_seqs: int, may_split: bool = True) -> int | None:
        """The unit for a request, its level raised and its account booked; None if it fits none.

        Without `may_split` a prompt that a unit would hold in a pass without others is not begun
        there in the rest of one: it would take two passes where the next departure's takes one.
        """
        if waiting.hits:
            picked = self._pick_cached(waiting, max_num_seqs, may_split)
        else:
            picked = self._pick_emptiest(waiting, max_num_seqs, may_split)
        if picked is not None:
            self._rooms[picked] -= book(self._units[picked], waiting)
            heapq.heappush(self._heap, self._entry(picked))
        return picked

    def _pick_emptiest(self, waiting: Waiting, max_num_seqs: int, may_split: bool) -> int | None:
        whole = not may_split and waiting.num_tokens <= self._smallest
        least = waiting.num_tokens if whole else 1  # no unit takes it with less
        skipped, picked = [], None
        while (entry := self._top()) is not None and -entry[0] >= least:
            if self._takes(entry[2], waiting, max_num_seqs, may_split):
                picked = entry[2]
                break
            skipped.append(heapq.heappop(self._heap))
        for entry in skipped:
            heapq.heappush(self._heap, entry)
        return picked

    def _pick_cached(self, waiting: Waiting, max_num_seqs: int, may_split: bool) -> int | None:
        """As above with the levels as they would become, and a preference for the longest hit."""
        levels = {
            index: room - uncached(waiting, index)
            for index, room in self._rooms.items()
            if self._takes(index, waiting, max_num_seqs, may_split)
        }
        if not levels:
            return None
        best = max(levels, key=lambda index: (levels[index], -index))
        cached = max(levels, key=lambda index: (waiting.hits.get(index, 0), levels[index], -index))
        slack = int(STICKINESS * self._budget)
        return cached if levels[cached] >= levels[best] - slack else best

    def _takes(self, index: int, waiting: Waiting, max_num_seqs: int, may_split: bool) -> bool:
        num_tokens = uncached(waiting, index)
        whole = not may_split and num_tokens <= self._empty_rooms[index]
        has_room = self._rooms[index] >= (num_tokens if whole else 1)
        return has_room and fits(self._units[index], waiting, max_num_seqs)

    def _entry(self, index: int) -> tuple[int, int, int]:
        return (-self._rooms[index], -self._units[index].account.free_blocks, index)

    def _top(self) -> tuple[int, int, int] | None:
        heap = self._heap
        while heap and -heap[0][0] != self._rooms[heap[0][2]]:
            heapq.heappop(heap)  # an entry from before its level rose
        return heap[0] if heap else None


class RoundRobin:
    """The same interface, blind to levels: one after the other, as far as there is any room."""

    def __init__(self, units: Sequence[Unit], rooms: Mapping[int, int], first: int) -> None:
        self._units = [unit for unit in units if unit.index in rooms]
        self._rooms = dict(rooms)
        self.next = first  # where the next departure of this instance goes on

    @property
    def room(self) -> int:
        return sum(room for room in self._rooms.values() if room > 0)

    def pick(self, waiting: Waiting, max_num_seqs: int, may_split: bool = True) -> int | None:
        for offset in range(len(self._units)):
            unit = self._units[(self.next + offset) % len(self._units)]
            if self._rooms[unit.index] > 0 and fits(unit, waiting, max_num_seqs):
                self.next += offset + 1
                self._rooms[unit.index] -= book(unit, waiting)
                return unit.index
        return None


def uncached(waiting: Waiting, index: int) -> int:
    """Prompt tokens that this unit would have to compute: the last one is computed in any case."""
    return max(1, waiting.num_tokens - waiting.hits.get(index, 0))


def book(unit: Unit, waiting: Waiting) -> int:
    """Enter a request in its unit's account; the tokens that it has to compute there."""
    num_tokens = uncached(waiting, unit.index)
    unit.account.send(num_tokens, waiting.num_blocks)
    return num_tokens


def fits(unit: Unit, waiting: Waiting, max_num_seqs: int) -> bool:
    """A unit that holds nothing takes whatever comes: what can never fit is refused there."""
    return not unit.account.num_sequences or has_place(unit, max_num_seqs, waiting.num_blocks)


def has_place(unit: Unit, max_num_seqs: int, num_blocks: int = 1) -> bool:
    """Whether a unit that holds something can hold one more of so many blocks."""
    account = unit.account
    return account.free_blocks >= num_blocks and account.num_sequences < max_num_seqs
