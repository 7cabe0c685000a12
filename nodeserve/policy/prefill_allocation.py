"""Which instance prefills the next waiting request.

Late binding: a request leaves the buffer only for an instance that can start it soon, so the choice
is made with the freshest loads and a cancelled request costs no worker anything.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(slots=True)
class PrefillLoad:
    """What one prefill or mixed instance has been given and has not finished.

    `free_blocks` counts what the instance last reported less what was assigned since.
    """

    instance: int
    outstanding_tokens: int
    num_sequences: int
    free_blocks: int
    last_assigned: int  # rises with each assignment on the node; breaks ties towards rotation


def pick_prefill(
    loads: Iterable[PrefillLoad], num_blocks: int, max_outstanding_tokens: int, max_sequences: int
) -> PrefillLoad | None:
    """The eligible instance with the fewest outstanding prompt tokens; None: wait.

    Eligible: its queue is below `max_outstanding_tokens`, it holds fewer than `max_sequences`, and
    its pages can take `num_blocks` more. O(instances).
    """
    eligible = (
        load
        for load in loads
        if load.outstanding_tokens < max_outstanding_tokens
        and load.num_sequences < max_sequences
        and load.free_blocks >= num_blocks
    )
    return min(
        eligible,
        key=lambda load: (load.outstanding_tokens, load.num_sequences, load.last_assigned),
        default=None,
    )
