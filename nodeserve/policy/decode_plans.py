"""Decodes of a batch that is planned while others are under way, with less knowledge than usual.

It never preempts: a batch before may free blocks. There is no plan (plan again after the commit) if
blocks are short.

Ahead: behind the one batch that runs. Its tokens are not known yet: who is in both reads its input
on the device (`Work.feed`). A sequence that ends by length with the token to come is left out; one
that ends by a stop token is not, and its extra token is dropped. There is no plan if a choice needs
earlier tokens on the host (`Sampling.needs_tokens`), or behind a batch with prefill tokens: such
steps are long, a newcomer must not wait for two of them, and the gap after one is small against it.

Beside: on a device of several stages, each of which works on another batch. A decode belongs to one
of them, since its next input is the token to come. They are dealt out evenly, so that no stage
waits for a batch that has them all. Chunks of one prompt may follow each other: every stage takes
them in order.
"""

from collections.abc import Sequence as Sequences

from nodeserve.policy.batching import Batch, Sequence, Work
from nodeserve.policy.blocks import BlockAllocator


def share(num_running: int, num_stages: int) -> int:
    """Decodes of one batch, where each stage has another."""
    return -(-num_running // num_stages)


def decodes_ahead(
    running: Sequences[Sequence], blocks: BlockAllocator, block_size: int, before: Batch
) -> list[Work] | None:
    """None, and nothing taken, if `before` must be committed first."""
    if before.num_prefill_tokens:
        return None
    work: list[Work] = []
    for sequence in running:
        pending = sequence.num_launched
        if len(sequence.token_ids) + pending >= sequence.max_len:
            continue  # the token to come is its last
        if pending and sequence.sampling.needs_tokens:
            return None
        feed = sequence.place if pending else None
        work.append(Work(sequence, sequence.num_computed, 1, True, feed))
    return work if _grown(work, blocks, block_size) else None


def decodes_beside(
    running: Sequences[Sequence], blocks: BlockAllocator, block_size: int, num_stages: int
) -> list[Work] | None:
    """Of those that no batch under way has. None, and nothing taken, if one must be committed."""
    idle = [sequence for sequence in running if not sequence.num_launched]
    mine = idle[: share(len(running), num_stages)]
    work = [Work(sequence, sequence.num_computed, 1, True) for sequence in mine]
    return work if _grown(work, blocks, block_size) else None


def _grown(work: list[Work], blocks: BlockAllocator, block_size: int) -> bool:
    """One more block for each that needs it; False, and nothing taken, if there are too few."""
    whole = [one for one in work if one.start == len(one.sequence.block_ids) * block_size]
    if len(whole) > blocks.num_free:
        return False
    for one in whole:
        one.sequence.block_ids.extend(blocks.allocate(1))
    return True
