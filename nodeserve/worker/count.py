"""A worker's part of an audit: everything counted anew, from the pool and the sequences."""

import traceback
from collections.abc import Iterable

from nodeserve.policy.batching import Batch, Stage
from nodeserve.policy.scheduler import Scheduler
from nodeserve.wire.messages import Counted
from nodeserve.wire.numbers import pack_request_ids


def counted(
    number: int,
    scheduler: Scheduler,
    untold: Iterable[Batch],
    load: list[int],
    num_received: int,
    num_sent: int,
) -> Counted:
    """The answer to a Count. O(blocks). `untold`: batches that no StepDone has told of."""
    sequences = scheduler.held()

    def ids(stage: Stage) -> bytes:
        return pack_request_ids(one.request_id for one in sequences if one.stage is stage)

    return Counted(
        number=number,
        num_records_received=num_received,
        num_records_sent=num_sent,
        num_blocks=scheduler.limits.num_blocks,
        num_free=scheduler.blocks.num_free,
        num_held=sum(len(one.block_ids) for one in sequences),
        waiting=ids(Stage.WAITING),
        running=ids(Stage.RUNNING),
        pulling=ids(Stage.PULLING),
        pinned=ids(Stage.PINNED),
        preempted=pack_request_ids(one for batch in untold for one in batch.preempted),
        load=load,
        problem=problem_of(scheduler),
    )


def problem_of(scheduler: Scheduler) -> str:
    """The first of the scheduler's promises that does not hold; empty if all do."""
    try:
        scheduler.check()
    except AssertionError as broken:
        where = traceback.extract_tb(broken.__traceback__)[-1]
        return f"{where.name}: {str(broken) or where.line}"
    return ""
