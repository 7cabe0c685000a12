"""Which instance decodes a request whose pages are ready."""

from collections.abc import Iterable
from dataclasses import dataclass


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
