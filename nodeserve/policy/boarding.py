"""Who is on board when a batch departs: which requests leave the buffer, and for which unit.

The buffer says in which order requests are considered, prefill_allocation.py where each goes. Here
is how much of an instance may be filled.
"""

import math
from collections.abc import Sequence

from nodeserve.policy.buffer import Buffer, class_of
from nodeserve.policy.pass_times import PassTimes
from nodeserve.policy.prefill_allocation import RoundRobin, WaterFilling, has_place
from nodeserve.policy.prefill_instance import PrefillInstance
from nodeserve.policy.units import DispatchOptions, Unit, Waiting
from nodeserve.policy.window import Mean

MAX_SKIPPED = 32  # requests without room that one departure looks behind
MAX_ROUNDS_SKIPPED = 16  # a request left behind so often is not overtaken by smaller ones any more
VARIED = 0.3  # coefficient of variation of prompt lengths from which shorter ones fill gaps


class Boarding:
    """Takes requests out of the buffer and books them in the accounts of their units."""

    def __init__(self, buffer: Buffer, times: PassTimes, options: DispatchOptions) -> None:
        self._buffer = buffer
        self._times = times
        self._options = options
        self._tokens, self._squares = Mean(), Mean()  # of the lengths of those that boarded

    def board(
        self,
        instance: PrefillInstance,
        others: Sequence[PrefillInstance],
        now_s: float,
        may_split: bool,
    ) -> list[tuple[Waiting, int]]:
        """Take as many as there is room for, in the buffer's order, and allocate them: requests
        and the index of the unit of each. `others` are those that may take a share, `may_split` is
        WaterFilling's for newcomers."""
        rooms = self._rooms(instance)
        room = sum(room for room in rooms.values() if room > 0)
        batch = self._buffer.hide(room)
        if batch:
            longest = max(waiting.num_tokens for waiting in batch)
            most = max(longest, self._share(instance, others, room, now_s))
            rooms = {index: min(room, most) for index, room in rooms.items()}
        filling = self._filling(instance, rooms)
        may_split |= not self._lengths_vary
        boarded: list[tuple[Waiting, int]] = []
        unfit: list[Waiting] = []
        reserved = False
        while batch:
            for waiting in sorted(batch, key=self._placement_order):
                rounds = self._buffer.rounds_of(waiting)
                unit = None
                if not reserved and len(unfit) < MAX_SKIPPED:
                    splits = may_split or rounds > 0
                    unit = filling.pick(waiting, self._options.max_num_seqs, splits)
                if unit is not None:
                    self._take(waiting)
                    boarded.append((waiting, unit))
                else:
                    unfit.append(waiting)
                    # What comes free is kept for one that was passed over for long.
                    reserved |= rounds >= MAX_ROUNDS_SKIPPED
            looks_on = not reserved and len(unfit) < MAX_SKIPPED
            batch = self._buffer.hide(filling.room) if looks_on else []
        for waiting in unfit:
            self._buffer.show(waiting)
        if isinstance(filling, RoundRobin):
            instance.turn = filling.next
        return boarded

    def _take(self, waiting: Waiting) -> None:
        self._buffer.remove(waiting.request_id)
        self._tokens.add(waiting.num_tokens)
        self._squares.add(waiting.num_tokens**2)

    @property
    def _lengths_vary(self) -> bool:
        """Whether a place too short for one prompt is likely to be filled by another."""
        return self._squares.value > (1 + VARIED**2) * self._tokens.value**2

    def _placement_order(self, waiting: Waiting) -> tuple[tuple[int, bool], bool, int]:
        """Of those that board, whoever was left behind before goes first, and then the longest:
        that packs best."""
        newcomer = not self._buffer.rounds_of(waiting)
        return class_of(waiting), newcomer, -waiting.num_tokens

    def _rooms(self, instance: PrefillInstance) -> dict[int, int]:
        """Tokens, by unit, that still fit the pass that comes."""
        rooms = instance.rooms()
        return {unit.index: rooms[unit.index] for unit in instance.units if self._has_place(unit)}

    def _share(
        self, leaving: PrefillInstance, others: Sequence[PrefillInstance], room: int, now_s: float
    ) -> int:
        """Tokens of each unit if the others that open soon share those who wait: filled to the
        brim, this one's pass would be long while theirs are empty. Soon is before the time is
        over that half the tokens save, so where all passes take as long nothing is shared.

        The caller does not go below the longest prompt, as long as which the pass takes anyway.
        """
        num_tokens, num_units = self._buffer.num_tokens, len(leaving.units)
        level = min(num_tokens, room) // num_units
        saved_s = self._times.level_s(level, num_units) - self._times.level_s(level // 2, num_units)
        for one in others:
            if one.opens_s(now_s) < now_s + saved_s:
                num_units += len(one.units)
        return room if num_units == len(leaving.units) else math.ceil(num_tokens / num_units)

    def _filling(
        self, instance: PrefillInstance, rooms: dict[int, int]
    ) -> WaterFilling | RoundRobin:
        if self._options.prefill_allocation == "round-robin":
            return RoundRobin(instance.units, rooms, instance.turn)
        return WaterFilling(instance.units, rooms, self._options.budget)

    def _has_place(self, unit: Unit) -> bool:
        empty = not unit.account.num_sequences
        return empty or (has_place(unit, self._options.max_num_seqs) and not self._is_clogged(unit))

    def _is_clogged(self, unit: Unit) -> bool:
        """Its memory is full of pages that nobody has room to decode: filling it further would
        only move the queue from the buffer, where it can still be reordered, to there."""
        account = unit.account
        if not account.load.num_pinned:
            return False
        least = (1.0 - self._options.max_parked_share) * account.num_blocks
        return account.free_blocks < least
