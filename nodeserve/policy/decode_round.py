"""One round of decode allocation: what each unit would hold once those before were placed.

Nothing is booked here; a round that turns out wrong is thrown away. A request costs a walk from the
best unit to the first that it fits, and O(log units) to put that one back in its place.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable

from nodeserve.policy.blocks import watermark
from nodeserve.policy.units import Unit

SPREADS = 1.5  # of the quartiles, above the upper one: more than that is an outlier (Tukey)
NEAR_MEDIAN = 1.05  # and nothing is an outlier that is so near the median

Key = tuple[float, ...]  # the lowest is the best; ends with the unit's index, so no two are equal


class Seat:
    """A unit in this round. `growth_blocks` is what its sequences are still expected to take,
    `turn` rises with each request that any unit is given.

    `room` is the blocks that a newcomer may come to take, its own growth included. An empty unit
    offers all it has. One that is not keeps what its sequences will grow by: as expected, but at
    least a block each (each takes one within block_size steps), and what the worker itself keeps.
    """

    __slots__ = ("growth_blocks", "kv_blocks", "num_sequences", "room", "turn", "unit")

    def __init__(self, unit: Unit, turn: int, growth_blocks: float) -> None:
        self.unit = unit
        self.turn = turn
        self.growth_blocks = growth_blocks
        self.num_sequences = unit.account.num_sequences
        self.kv_blocks = unit.account.num_blocks - unit.account.free_blocks
        self._find_room()

    def take(self, turn: int, num_blocks: int, growth_blocks: float) -> None:
        """One more sequence."""
        self.turn = turn
        self.growth_blocks += growth_blocks
        self.num_sequences += 1
        self.kv_blocks += num_blocks
        self._find_room()

    def _find_room(self) -> None:
        num_blocks, num_sequences = self.unit.account.num_blocks, self.num_sequences
        self.room: float = num_blocks - self.kv_blocks
        if num_sequences:
            self.room -= max(watermark(num_blocks), num_sequences, self.growth_blocks)


class Round:
    """Units that can take more, best first by `key`."""

    def __init__(
        self, seats: Iterable[Seat], key: Callable[[Seat], Key], max_num_seqs: int, masks: bool
    ) -> None:
        self._key = key
        self._max_num_seqs = max_num_seqs
        self._masks = masks
        usable = [seat for seat in seats if self._usable(seat)]
        self._turn = max((seat.turn for seat in usable), default=0)
        self._line = sorted(((key(seat), seat) for seat in usable), key=_first)
        self._kv_blocks = sorted(seat.kv_blocks for seat in usable)
        self._too_much = math.inf  # nobody had room for this, and rooms only shrink

    def best(self, num_blocks: float) -> Seat | None:
        """The best unit with room for that; one whose KV is an outlier only if there is no other.
        None: there is no room."""
        if num_blocks >= self._too_much:
            return None
        highest, masked = self._highest(), None
        for _, seat in self._line:
            if seat.room >= num_blocks:
                if seat.kv_blocks <= highest:
                    return seat
                masked = masked or seat
        if masked is None:
            self._too_much = num_blocks
        return masked

    def put(self, seat: Seat, num_blocks: int, growth_blocks: float) -> None:
        """A request takes `num_blocks` there now and `growth_blocks` later."""
        self.remove(seat)
        self._turn += 1
        seat.take(self._turn, num_blocks, growth_blocks)
        if self._usable(seat):
            insort(self._line, (self._key(seat), seat), key=_first)
            insort(self._kv_blocks, seat.kv_blocks)

    def remove(self, seat: Seat) -> None:
        """Take a unit out, if it is in."""
        place = bisect_left(self._line, self._key(seat), key=_first)
        if place < len(self._line) and self._line[place][1] is seat:
            del self._line[place]
            del self._kv_blocks[bisect_left(self._kv_blocks, seat.kv_blocks)]

    def _usable(self, seat: Seat) -> bool:
        return seat.num_sequences < self._max_num_seqs and seat.room >= 1

    def _highest(self) -> float:
        """KV above this is an outlier. The rule is that of staggered batch scheduling, without its
        trap that among equals a block more stands out. Of three units or fewer none can be one."""
        sizes = self._kv_blocks
        if not self._masks or not sizes:
            return math.inf
        lower, median, upper = (_quantile(sizes, share) for share in (0.25, 0.5, 0.75))
        return max(upper + SPREADS * (upper - lower), median * NEAR_MEDIAN, median + 1)


def _first(entry: tuple[Key, Seat]) -> Key:
    return entry[0]


def _quantile(sizes: list[int], share: float) -> float:
    """Linear between the two nearest."""
    place = share * (len(sizes) - 1)
    below = int(place)
    above = min(below + 1, len(sizes) - 1)
    return sizes[below] + (place - below) * (sizes[above] - sizes[below])
