"""Which unit decodes a request whose pages are ready."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nodeserve.policy.cost import RankWork
from nodeserve.policy.decode_round import TOGETHER, Key, Round, Seat
from nodeserve.policy.pass_times import PassTimes
from nodeserve.policy.units import Unit

LEAST_STEPS = 64  # decode steps seen before their costs are believed
FIRST_SHARE, PRIOR_BLOCKS = 0.5, 64.0  # growth_share before any request ended, and its weight
KEEP = 1 - 1 / 256  # of what is known of growth, when one more request ends


@dataclass(slots=True, eq=False)
class ReadyKv:
    """A prefilled request whose pages wait for a unit that decodes it."""

    request_id: int
    num_blocks: int  # of its KV and the next token
    growth_blocks: int  # more that it may come to take until it ends


class _Placed(NamedTuple):
    unit: int
    num_blocks: int
    growth_blocks: int


class DecodeAllocator:
    """Places rounds of prefilled requests; `policy` is one of units.DECODE_ALLOCATIONS.

    - round-robin: the unit that was given one longest ago.
    - fewest-requests: as it says.
    - iqr: the fewest requests, then the least KV, of the units whose KV is no outlier.
    - cost: the unit that is done first with its part of a step, `seq_s * requests + kv_token_s *
      tokens`; the ranks of an instance wait for the slowest. Both coefficients are learned from
      steps; until they are, this is iqr.

    The last two place the longest first, so that short ones even out what those left. (Weighing how
    many sequences of an instance a slower step holds up gave up to 4 % more tokens/s in a closed
    loop, by gathering long contexts on one instance: P99 time per token was 6 to 40 % worse there.)

    Room: a unit that holds sequences keeps free what they are expected to need, see
    decode_round.Seat: they grow by the share `growth_share` of what they may, learned from those
    that ended. An empty unit takes whatever fits. If not all of a round fits, it is served in its
    order. The first without room then has a unit kept for it, that with the most free blocks, until
    it is placed: those behind it get the others, so its wait ends when the sequences there have
    ended, if not before. Only what comes before it in the order can overtake it; that order is the
    caller's.
    """

    def __init__(self, policy: str, max_num_seqs: int, block_size: int = 16) -> None:
        self.policy = policy
        self.max_num_seqs = max_num_seqs
        self.block_size = block_size  # tokens
        self.times = PassTimes()  # of decode steps
        self._placed: dict[int, _Placed] = {}  # by request
        self._placed_blocks: dict[int, int] = {}  # by unit: when placed, of those there now
        self._growth_blocks: dict[int, int] = {}  # by unit: that those may come to take
        self._turns: dict[int, int] = {}  # by unit: when it was last given one
        self._num_turns = 0
        self._kept: tuple[int, int] | None = None  # a request and the unit kept for it
        self._grown, self._could_grow = FIRST_SHARE * PRIOR_BLOCKS, PRIOR_BLOCKS

    @property
    def growth_share(self) -> float:
        """Share of what sequences may grow by that those which run now are expected to take."""
        return self._grown / self._could_grow

    def place(
        self, ready: Sequence[ReadyKv], units: Sequence[Unit]
    ) -> list[tuple[ReadyKv, int | None]]:
        """The index of the unit for each (None: no room now), booked in its account at once.

        `ready` is in order of priority, the oldest first; `units` are those that may be used.
        """
        if not ready or not units:
            return [(one, None) for one in ready]
        longest_first = self.policy in ("iqr", "cost")
        order = sorted(ready, key=_num_blocks, reverse=True) if longest_first else ready
        found = self._fill(order, units, all_or_none=longest_first)
        if found is None:
            found = self._fill(ready, units) or {}
        placed: list[tuple[ReadyKv, int | None]] = []
        for one in ready:
            unit = found.get(one.request_id)
            if unit is not None:
                self._book(one, unit)
            placed.append((one, None if unit is None else unit.index))
        return placed

    def forget(self, request_id: int, grown_blocks: int | None = None) -> None:
        """A placed request ended or left its unit; unknown ids are fine.

        `grown_blocks`, of its `growth_blocks`, is for one that ended by itself: its like are
        expected to grow so.
        """
        placed = self._placed.pop(request_id, None)
        if placed is None:
            return
        self._placed_blocks[placed.unit] -= placed.num_blocks
        self._growth_blocks[placed.unit] -= placed.growth_blocks
        if grown_blocks and placed.growth_blocks:
            # One that grew twice as much was there for twice as long: among those that run at any
            # time its like are twice as many.
            share = min(1.0, grown_blocks / placed.growth_blocks)
            self._grown = KEEP * self._grown + grown_blocks * share
            self._could_grow = KEEP * self._could_grow + grown_blocks

    def observe(self, ranks: Sequence[RankWork], seconds: float) -> None:
        """A decode step of one instance took so long: step costs are learned from that."""
        self.times.observe(ranks, seconds)

    # ---- a round

    def _fill(
        self, order: Sequence[ReadyKv], units: Sequence[Unit], all_or_none: bool = False
    ) -> dict[int, Unit] | None:
        """Units of those that have room, by request; a unit is kept for the first that has none.

        `all_or_none`: None, and nothing changed, if there is such a one.
        """
        share = self.growth_share
        seats = {unit.index: self._seat(unit, share) for unit in units}
        round_ = self._open(seats.values())
        smallest = min(unit.account.num_blocks for unit in units)
        found: dict[int, Unit] = {}
        kept: tuple[int, int] | None = None
        for one in order:
            seat = self._put(round_, one, smallest)
            if seat is not None:
                found[one.request_id] = seat.unit
            elif all_or_none:
                return None
            elif kept is None and (unit := self._unit_to_keep(one, units)) is not None:
                kept = one.request_id, unit.index
                round_.remove(seats[unit.index])
        self._kept = kept
        return found

    def _put(self, round_: Round, one: ReadyKv, smallest: int) -> Seat | None:
        growth_blocks = self.growth_share * one.growth_blocks
        # Never more than an empty unit has, so that one always takes it.
        needed = min(one.num_blocks + TOGETHER * growth_blocks, smallest)
        num_blocks = max(one.num_blocks, needed)
        seat = round_.best(num_blocks)
        if seat is not None:
            round_.put(seat, one.num_blocks, growth_blocks)
        return seat

    def _unit_to_keep(self, one: ReadyKv, units: Sequence[Unit]) -> Unit | None:
        """The one kept for it already, else that with the most free blocks; None if it could not
        even run alone."""
        possible = [unit for unit in units if unit.account.num_blocks >= one.num_blocks]
        kept = [unit for unit in possible if (one.request_id, unit.index) == self._kept]
        return max(kept or possible, key=lambda unit: unit.account.free_blocks, default=None)

    def _seat(self, unit: Unit, growth_share: float) -> Seat:
        account, index = unit.account, unit.index
        used = account.num_blocks - account.free_blocks
        grown = used - self._placed_blocks.get(index, 0)
        expected = growth_share * self._growth_blocks.get(index, 0) - grown
        return Seat(unit, self._turns.get(index, 0), max(0.0, expected))

    def _open(self, seats: Iterable[Seat]) -> Round:
        key, masks = self._order()
        open_seats = [seat for seat in seats if not seat.unit.account.refused]
        return Round(open_seats, key, self.max_num_seqs, masks)

    def _order(self) -> tuple[Callable[[Seat], Key], bool]:
        """How units compare, and whether outliers are masked."""
        if self.policy == "round-robin":
            return lambda seat: (seat.turn, seat.unit.index), False
        if self.policy == "fewest-requests":
            return lambda seat: (seat.num_sequences, seat.unit.index), False
        costs = self.times.decode_costs(LEAST_STEPS) if self.policy == "cost" else None
        if costs is None:
            return lambda seat: (seat.num_sequences, seat.kv_blocks, seat.unit.index), True
        seq_s, block_s = costs[0], costs[1] * self.block_size
        return (
            lambda seat: (
                seq_s * seat.num_sequences + block_s * seat.kv_blocks,
                seat.unit.index,
            )
        ), False

    def _book(self, one: ReadyKv, unit: Unit) -> None:
        self.forget(one.request_id)  # if it was placed before, and refused
        unit.account.send(0, one.num_blocks)
        index = unit.index
        self._placed[one.request_id] = _Placed(index, one.num_blocks, one.growth_blocks)
        self._placed_blocks[index] = self._placed_blocks.get(index, 0) + one.num_blocks
        self._growth_blocks[index] = self._growth_blocks.get(index, 0) + one.growth_blocks
        self._num_turns += 1
        self._turns[index] = self._num_turns


def _num_blocks(one: ReadyKv) -> int:
    return one.num_blocks
