"""Which instance decodes a request whose pages are ready."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nodeserve.policy.cost import RankWork
from nodeserve.policy.units import Unit


@dataclass(slots=True)
class DecodeLoad:
    """What one decode instance runs or is about to pull.

    `free_blocks` counts what the instance last reported less what was promised since; `refused` is
    set from a refusal until the instance reports a change.
    """

    instance: int
    num_sequences: int
    free_blocks: int
    refused: bool


def pick_decode(
    loads: Iterable[DecodeLoad], num_blocks: int, max_sequences: int
) -> DecodeLoad | None:
    """The instance with the fewest sequences, then the most free blocks; None: pages stay parked.

    An instance takes a request only with a block to spare for each sequence it runs, so that
    joining does not force a preemption at the next step. O(instances).
    """
    eligible = (
        load
        for load in loads
        if not load.refused
        and load.num_sequences < max_sequences
        and load.free_blocks >= num_blocks + min(load.num_sequences, 8)
    )
    return min(eligible, key=lambda load: (load.num_sequences, -load.free_blocks), default=None)


@dataclass(slots=True, eq=False)
class ReadyKv:
    """A prefilled request whose pages wait for a unit that decodes it."""

    request_id: int
    num_blocks: int  # of its KV and the next token
    growth_blocks: int  # more that it may come to take until it ends


class DecodeAllocator:
    """Places rounds of prefilled requests; `policy` is one of units.DECODE_ALLOCATIONS."""

    def __init__(self, policy: str, max_num_seqs: int) -> None:
        self.policy = policy
        self.max_num_seqs = max_num_seqs

    def place(
        self, ready: Sequence[ReadyKv], units: Sequence[Unit]
    ) -> list[tuple[ReadyKv, int | None]]:
        """The index of the unit for each (None: no room now), booked in its account at once."""
        placed: list[tuple[ReadyKv, int | None]] = []
        for one in ready:
            room = [
                unit
                for unit in units
                if not unit.account.refused
                and unit.account.num_sequences < self.max_num_seqs
                and unit.account.free_blocks >= one.num_blocks + min(unit.account.num_sequences, 8)
            ]
            best = min(room, key=lambda unit: unit.account.num_sequences, default=None)
            if best is not None:
                best.account.send(0, one.num_blocks)
            placed.append((one, None if best is None else best.index))
        return placed

    def forget(self, request_id: int) -> None:
        """A placed request ended or left its unit; unknown ids are fine."""

    def observe(self, ranks: Sequence[RankWork], seconds: float) -> None:
        """A decode step of one instance took so long: step costs are learned from that."""
