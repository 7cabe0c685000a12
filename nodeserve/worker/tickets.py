"""What a pull asks for, checked before anything is copied: the same on every device."""

from array import array

from nodeserve.errors import HandoffFailed
from nodeserve.wire.messages import unpack_ids
from nodeserve.worker.contract import Ticket


def ids_of(ticket: Ticket, num_blocks: int) -> "tuple[array[int], array[int]]":
    """Its source and target ids. HandoffFailed if they do not pair up, or if one is not among the
    `num_blocks` that the peer has."""
    source_ids, target_ids = unpack_ids(ticket.source_ids), unpack_ids(ticket.target_ids)
    if not source_ids or min(source_ids) < 0 or max(source_ids) >= num_blocks:
        raise HandoffFailed(
            f"worker {ticket.source} has blocks 0 to {num_blocks - 1}, asked for"
            f" {source_ids.tolist()}"
        )
    if len(source_ids) != len(target_ids):
        raise HandoffFailed(
            f"the KV of the request takes {len(target_ids)} blocks, worker {ticket.source} offers"
            f" {len(source_ids)}"
        )
    return source_ids, target_ids


def unattached(ticket: Ticket) -> HandoffFailed:
    return HandoffFailed(f"the pages of worker {ticket.source} are not attached here")
