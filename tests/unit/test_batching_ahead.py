"""A batch planned behind one that still runs: what is in it, what is not, and what its end does."""

from typing import Any

import pytest

from nodeserve.policy.batching import GOES_ON, LENGTH, STOP, Batch, Outcome, Stage
from nodeserve.policy.scheduler import Scheduler
from tests.unit.test_batching import EOS, plan, scheduler_with, sequence_of

Rows = list[tuple[int, int, int, int | None]]


def launch(scheduler: Scheduler, ahead: bool = False) -> Batch:
    batch = scheduler.next_batch(ahead=ahead)
    assert batch is not None
    scheduler.check()
    return batch


def rows(batch: Batch) -> Rows:
    return [(w.sequence.request_id, w.start, w.num_tokens, w.feed) for w in batch.work]


def commit(scheduler: Scheduler, batch: Batch, *token_ids: int) -> Outcome:
    outcome = scheduler.commit(batch, list(token_ids))
    scheduler.check()
    return outcome


def running(*request_ids: int, sampling: dict[str, Any] | None = None, **limits: Any) -> Scheduler:
    """Requests of 4 prompt tokens, with their first token."""
    scheduler = scheduler_with(**limits)
    for request_id in request_ids:
        scheduler.submit(sequence_of(request_id, 4, **(sampling or {})))
    while scheduler.load()[1]:
        plan(scheduler)
    return scheduler


def test_the_token_to_come_is_named_by_its_place_in_the_batch_before() -> None:
    scheduler = running(1, 2, 3)
    first = launch(scheduler)
    assert rows(first) == [(1, 4, 1, None), (2, 4, 1, None), (3, 4, 1, None)]
    second = launch(scheduler, ahead=True)
    assert rows(second) == [(1, 5, 1, 0), (2, 5, 1, 1), (3, 5, 1, 2)]
    assert [work.num_output for work in second.work] == [2, 2, 2]
    scheduler.cancel(1)
    assert commit(scheduler, first, 5, 6, 7).request_ids == [2, 3]
    third = launch(scheduler, ahead=True)
    assert rows(third) == [(2, 6, 1, 1), (3, 6, 1, 2)], "places in the second batch, not the first"
    commit(scheduler, second, 8, 9, 10)
    fourth = launch(scheduler, ahead=True)
    assert rows(fourth) == [(2, 7, 1, 0), (3, 7, 1, 1)]


def test_a_batch_that_was_committed_leaves_nothing_to_feed() -> None:
    scheduler = running(1)
    commit(scheduler, launch(scheduler), 5)
    assert rows(launch(scheduler)) == [(1, 5, 1, None)]


def test_who_ends_by_length_with_the_token_to_come_is_left_out() -> None:
    scheduler = running(1, sampling={"max_tokens": 3})
    first = launch(scheduler)
    second = launch(scheduler, ahead=True)
    assert rows(second) == [(1, 5, 1, 0)]
    assert commit(scheduler, first, 5).finish == [GOES_ON]
    assert scheduler.next_batch(ahead=True) is None
    scheduler.check()
    assert commit(scheduler, second, 5).finish == [LENGTH]
    assert scheduler.load() == [0, 0, 0, 64, 0]


@pytest.mark.parametrize(
    ("sampling", "ahead"),
    [
        ({}, True),
        ({"temperature": 0.7, "seed": 3, "logit_bias": {4: 1.0}, "min_tokens": 9}, True),
        ({"repetition_penalty": 1.1}, False),
        ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": -0.1}, False),
    ],
)
def test_a_choice_that_needs_earlier_tokens_waits_for_them(
    sampling: dict[str, Any], ahead: bool
) -> None:
    scheduler = running(1)
    scheduler.submit(sequence_of(2, 4, **sampling))
    plan(scheduler)
    first = launch(scheduler)
    free = scheduler.load()[3]
    assert (scheduler.next_batch(ahead=True) is not None) is ahead
    assert scheduler.load()[3] == free
    commit(scheduler, first, 5, 5)


def test_one_whose_last_token_comes_needs_no_earlier_ones() -> None:
    scheduler = running(1)
    scheduler.submit(sequence_of(2, 4, presence_penalty=0.5, max_tokens=2))
    plan(scheduler)
    launch(scheduler)
    assert rows(launch(scheduler, ahead=True)) == [(1, 6, 1, 0)]


def test_nothing_is_planned_behind_a_batch_with_prompt_tokens() -> None:
    scheduler = running(1)
    scheduler.submit(sequence_of(2, 40))
    first = launch(scheduler)
    assert first.num_prefill_tokens == 31
    assert scheduler.next_batch(ahead=True) is None
    commit(scheduler, first, 5)
    assert rows(launch(scheduler)) == [(1, 5, 1, None), (2, 31, 9, None)]
    assert scheduler.next_batch(ahead=True) is None


def test_a_new_prompt_joins_the_batch_behind() -> None:
    scheduler = running(1)
    first = launch(scheduler)
    scheduler.submit(sequence_of(2, 40))
    second = launch(scheduler, ahead=True)
    assert rows(second) == [(1, 5, 1, 0), (2, 0, 31, None)]
    assert [one.request_id for one in second.started] == [2]
    commit(scheduler, first, 5)
    assert scheduler.load()[4] == 40, "tokens wait until their step is over"
    commit(scheduler, second, 5)
    assert scheduler.load()[4] == 9


def test_a_pulled_request_joins_the_batch_behind_with_the_token_it_has() -> None:
    scheduler = running(1)
    first = launch(scheduler)
    pulled = sequence_of(2, 20)
    pulled.token_ids.append(7)
    assert scheduler.begin_pull(pulled)
    scheduler.finish_pull(2)
    assert rows(launch(scheduler, ahead=True)) == [(1, 5, 1, 0), (2, 20, 1, None)]
    commit(scheduler, first, 5)


def test_a_prompt_takes_the_place_of_one_that_ends_by_length() -> None:
    scheduler = running(1, sampling={"max_tokens": 2}, max_num_seqs=1)
    first = launch(scheduler)
    scheduler.submit(sequence_of(2, 4))
    second = launch(scheduler, ahead=True)
    assert rows(second) == [(2, 0, 4, None)]
    assert commit(scheduler, first, 5).finish == [LENGTH]
    assert commit(scheduler, second, 5).request_ids == [2]


def test_a_stop_drops_the_token_behind_it_and_keeps_its_blocks_so_long() -> None:
    scheduler = running(1, 2, 3)
    first = launch(scheduler)
    second = launch(scheduler, ahead=True)
    outcome = commit(scheduler, first, 5, EOS, 5)
    assert outcome.finish == [GOES_ON, STOP, GOES_ON] and outcome.kept == [0, 1, 2]
    assert scheduler.load()[3] == 61, "the second step writes to the stopped one's block"
    outcome = commit(scheduler, second, 7, 8, 9)
    assert (outcome.request_ids, outcome.token_ids) == ([1, 3], [7, 9])
    assert outcome.kept == [0, 2]
    assert scheduler.load()[3] == 62


@pytest.mark.parametrize("num_committed", [0, 1, 2])
def test_blocks_of_a_cancelled_one_wait_for_the_last_step_that_has_it(num_committed: int) -> None:
    scheduler = running(1, 2)
    batches = [launch(scheduler), launch(scheduler, ahead=True)]
    for batch in batches[:num_committed]:
        commit(scheduler, batch, 5, 5)
    scheduler.cancel(2)
    scheduler.check()
    assert scheduler.load()[0] == 1
    for place in range(num_committed, 2):
        assert scheduler.load()[3] == 62, "still written to"
        assert commit(scheduler, batches[place], 5, 5).request_ids == [1]
    assert scheduler.load()[3] == 63


def test_a_prompt_cancelled_while_it_is_computed_is_not_told() -> None:
    scheduler = scheduler_with()
    scheduler.submit(sequence_of(1, 20, handoff=True))
    scheduler.submit(sequence_of(2, 20))
    batch = launch(scheduler)
    assert rows(batch) == [(1, 0, 20, None), (2, 0, 12, None)]
    scheduler.cancel(1)
    assert scheduler.load() == [0, 1, 0, 60, 8 + 32], "the step with 32 tokens still runs"
    outcome = commit(scheduler, batch, 5)
    assert outcome.request_ids == [] and outcome.kv_ready == [] and outcome.kept == []
    assert scheduler.load() == [0, 1, 0, 62, 8]


def test_a_request_that_comes_back_is_not_taken_for_the_cancelled_one() -> None:
    scheduler = running(1)
    first, second = launch(scheduler), launch(scheduler, ahead=True)
    scheduler.cancel(1)
    again = sequence_of(1, 30)
    scheduler.submit(again)
    assert commit(scheduler, first, 5).request_ids == []
    assert commit(scheduler, second, 5).request_ids == []
    assert again.stage is Stage.WAITING and again.num_output == 0
    assert plan(scheduler) == [(1, 0, 30, True)]


def test_short_of_blocks_nothing_is_taken_and_nobody_is_preempted() -> None:
    """Two sequences at the edge of their blocks, one free block."""
    scheduler = scheduler_with(num_blocks=3, max_model_len=48)
    for request_id in (1, 2):
        scheduler.submit(sequence_of(request_id, 14, max_tokens=30))
    plan(scheduler)
    plan(scheduler)
    first = launch(scheduler)
    assert scheduler.load()[3] == 1 and [work.start for work in first.work] == [15, 15]
    assert scheduler.next_batch(ahead=True) is None
    scheduler.check()
    assert scheduler.load()[3] == 1
    commit(scheduler, first, 5, EOS)
    assert rows(launch(scheduler)) == [(1, 16, 1, None)]


def test_a_batch_behind_grows_from_free_blocks() -> None:
    scheduler = running(1, num_blocks=8, max_model_len=128)
    for _ in range(11):
        plan(scheduler)
    first = launch(scheduler)
    assert first.work[0].start == 15
    second = launch(scheduler, ahead=True)
    assert second.work[0].start == 16 and len(second.work[0].sequence.block_ids) == 2
    commit(scheduler, first, EOS)
    assert scheduler.load()[3] == 6
    commit(scheduler, second, 5)
    assert scheduler.load()[3] == 8


def test_pulls_count_the_prompts_that_are_on_their_way() -> None:
    scheduler = scheduler_with(max_num_seqs=3)
    for request_id in (1, 2):
        scheduler.submit(sequence_of(request_id, 4))
    batch = launch(scheduler)
    assert scheduler.begin_pull(sequence_of(3, 5))
    assert not scheduler.begin_pull(sequence_of(4, 5))
    commit(scheduler, batch, 5, 5)
    assert scheduler.load()[0] == 3, "the one that is pulled takes a place"


def test_a_pull_leaves_a_block_to_a_prompt_that_is_about_to_decode() -> None:
    scheduler = scheduler_with(num_blocks=8, max_model_len=128)
    scheduler.submit(sequence_of(1, 64))
    launch(scheduler)
    assert scheduler.begin_pull(sequence_of(2, 60, max_tokens=8)), "the prompt is half computed"
    scheduler = scheduler_with(num_blocks=8, max_model_len=128)
    scheduler.submit(sequence_of(1, 30))
    launch(scheduler)
    assert not scheduler.begin_pull(sequence_of(2, 90, max_tokens=8))
    assert scheduler.begin_pull(sequence_of(2, 80, max_tokens=8))


@pytest.mark.parametrize("num_launched", [0, 1, 2])
def test_one_batch_at_a_time_and_one_ahead_of_it(num_launched: int) -> None:
    scheduler = running(1)
    for place in range(num_launched):
        launch(scheduler, ahead=place == 1)
    for ahead in (False, True):
        if ahead != num_launched:
            with pytest.raises(AssertionError, match="one ahead"):
                scheduler.next_batch(ahead=ahead)


def test_batches_are_committed_in_their_order() -> None:
    scheduler = running(1)
    launch(scheduler)
    second = launch(scheduler, ahead=True)
    with pytest.raises(AssertionError, match="in the order"):
        scheduler.commit(second, [5])
