"""Batches for a device of several stages, each of which has another one under way."""

import random

import pytest

from nodeserve.policy.batching import Batch
from nodeserve.policy.scheduler import Scheduler
from tests.unit.test_batching import sequence_of
from tests.unit.test_batching_ahead import commit, launch, rows, running


def ids(batch: Batch) -> list[int]:
    return [work.sequence.request_id for work in batch.work]


def test_stages_share_the_decodes_evenly() -> None:
    scheduler = running(1, 2, 3, 4, 5, num_stages=2)
    first = launch(scheduler)
    second = launch(scheduler, ahead=True)
    assert (ids(first), ids(second)) == ([1, 2, 3], [4, 5])
    commit(scheduler, first, 7, 7, 7)
    third = launch(scheduler, ahead=True)
    assert rows(third) == [(1, 5, 1, None), (2, 5, 1, None), (3, 5, 1, None)]
    commit(scheduler, second, 8, 8)
    assert ids(launch(scheduler, ahead=True)) == [4, 5]


def test_a_sequence_is_in_one_batch_at_a_time() -> None:
    scheduler = running(1, num_stages=3)
    launch(scheduler)
    assert scheduler.next_batch(ahead=True) is None
    scheduler.check()


def test_no_more_batches_than_stages() -> None:
    scheduler = running(1, 2, 3, num_stages=2)
    launch(scheduler)
    launch(scheduler, ahead=True)
    with pytest.raises(AssertionError, match="one for each stage"):
        scheduler.next_batch(ahead=True)


def test_chunks_of_one_prompt_follow_each_other_through_the_stages() -> None:
    scheduler = running(num_stages=3, max_num_batched_tokens=8, max_num_seqs=4)
    scheduler.submit(sequence_of(1, 20))
    batches = [launch(scheduler), launch(scheduler, ahead=True), launch(scheduler, ahead=True)]
    assert [rows(batch) for batch in batches] == [
        [(1, 0, 8, None)],
        [(1, 8, 8, None)],
        [(1, 16, 4, None)],
    ]
    commit(scheduler, batches[0])
    scheduler.submit(sequence_of(2, 4))
    assert rows(launch(scheduler, ahead=True)) == [(2, 0, 4, None)], "the first has no more"
    commit(scheduler, batches[1])
    assert commit(scheduler, batches[2], 5).request_ids == [1]
    assert rows(launch(scheduler, ahead=True)) == [(1, 20, 1, None)]


def test_nobody_is_preempted_while_another_stage_may_free_blocks() -> None:
    sampling = {"max_tokens": 8}
    scheduler = running(1, 2, sampling=sampling, num_stages=2, num_blocks=3, block_size=4)
    for _ in range(4):
        first = launch(scheduler)
        assert ids(first) == [1] and scheduler.next_batch(ahead=True) is None
        scheduler.check()
        commit(scheduler, first, 9)
    first = launch(scheduler)
    assert ids(first) == [1] and first.preempted == [2], "with nothing under way, for its block"


@pytest.mark.parametrize("seed", range(20))
def test_random_lives_end_with_all_their_tokens(seed: int) -> None:
    """Requests come and go, some are cancelled, blocks are short; every batch adds up."""
    draw = random.Random(seed)
    stages = draw.choice([2, 3, 4])
    scheduler: Scheduler = running(num_stages=stages, num_blocks=24, block_size=4, max_num_seqs=6)
    under_way: list[Batch] = []
    waiting = {number: draw.randint(1, 30) for number in range(12)}
    open_ids: dict[int, int] = {}  # tokens that it still gets
    for _ in range(4000):
        if waiting and draw.random() < 0.2:
            number = draw.choice(list(waiting))
            open_ids[number] = draw.randint(1, 12)
            scheduler.submit(sequence_of(number, waiting.pop(number), max_tokens=open_ids[number]))
        if open_ids and draw.random() < 0.01:
            number = draw.choice(list(open_ids))
            del open_ids[number]
            scheduler.cancel(number)
        if len(under_way) < stages and draw.random() < 0.7:
            batch = scheduler.next_batch(ahead=bool(under_way))
            if batch is not None:
                under_way.append(batch)
                for number in batch.preempted:
                    waiting[number] = 20
                    del open_ids[number]
        elif under_way:
            batch = under_way.pop(0)
            outcome = scheduler.commit(batch, [9] * len(batch.sampled))
            for number, finish in zip(outcome.request_ids, outcome.finish, strict=True):
                open_ids[number] -= 1
                assert bool(finish) is (open_ids[number] == 0)
                if finish:
                    del open_ids[number]
        scheduler.check()
        decodes = [one for batch in under_way for one in ids(batch)[: batch.num_decodes]]
        assert len(decodes) == len(set(decodes))
        if not (waiting or open_ids or under_way):
            break
    assert not (waiting or open_ids or under_way)
    assert scheduler.blocks.num_free == 24
