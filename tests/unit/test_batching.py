"""The scheduler alone: chunking, pinning, pulls, preemption, cancels, and when a request ends."""

from array import array
from collections.abc import Callable
from typing import Any

import pytest

from nodeserve.errors import ConfigError, NodeServeError, OutOfBlocks, PromptTooLong
from nodeserve.policy.batching import (
    GOES_ON,
    LENGTH,
    STOP,
    Limits,
    Outcome,
    Sequence,
    Stage,
)
from nodeserve.policy.scheduler import Scheduler
from nodeserve.types import Sampling

BLOCK = 16
EOS = 2


def scheduler_with(**changes: Any) -> Scheduler:
    values: dict[str, Any] = {
        "num_blocks": 64,
        "block_size": BLOCK,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "eos_token_ids": frozenset({EOS}),
    }
    return Scheduler(Limits(**{**values, **changes}))


def sequence_of(
    request_id: int, num_prompt: int, handoff: bool = False, **sampling: Any
) -> Sequence:
    tokens = array("i", range(10, 10 + num_prompt))
    return Sequence(request_id, tokens, num_prompt, Sampling(**sampling), handoff)


def step(scheduler: Scheduler, token: Callable[[Sequence], int] = lambda one: 5) -> Outcome:
    batch = scheduler.next_batch()
    assert batch is not None
    outcome = scheduler.commit(batch, [token(one) for one in batch.sampled])
    scheduler.check()
    return outcome


def plan(scheduler: Scheduler) -> list[tuple[int, int, int, bool]]:
    batch = scheduler.next_batch()
    assert batch is not None
    work = [(w.sequence.request_id, w.start, w.num_tokens, w.samples) for w in batch.work]
    scheduler.commit(batch, [5] * len(batch.sampled))
    scheduler.check()
    return work


def test_decodes_go_first_and_prompt_chunks_fill_the_rest() -> None:
    scheduler = scheduler_with()
    scheduler.submit(sequence_of(1, 4))
    assert plan(scheduler) == [(1, 0, 4, True)]
    scheduler.submit(sequence_of(2, 40))
    scheduler.submit(sequence_of(3, 10))
    assert plan(scheduler) == [(1, 4, 1, True), (2, 0, 31, False)]
    assert scheduler.load()[4] == 9 + 10
    assert plan(scheduler) == [(1, 5, 1, True), (2, 31, 9, True), (3, 0, 10, True)]
    assert plan(scheduler) == [(1, 6, 1, True), (2, 40, 1, True), (3, 10, 1, True)]


def test_a_batch_says_which_requests_it_started() -> None:
    scheduler = scheduler_with()
    scheduler.submit(sequence_of(1, 40))
    first = scheduler.next_batch()
    assert (
        first is not None
        and [one.request_id for one in first.started] == [1]
        and first.num_prefill_tokens == 32
    )
    scheduler.commit(first, [])
    second = scheduler.next_batch()
    assert second is not None and second.started == []


def test_a_handoff_pins_its_blocks_until_released() -> None:
    scheduler = scheduler_with()
    scheduler.submit(sequence_of(1, 20, handoff=True))
    [(request_id, block_ids)] = step(scheduler).kv_ready
    assert request_id == 1 and len(block_ids) == 2
    assert scheduler.next_batch() is None
    assert scheduler.load() == [0, 0, 1, 62, 0]
    scheduler.release(1)
    scheduler.release(1)  # a cancel may have come first
    assert scheduler.load() == [0, 0, 0, 64, 0]


def test_a_handoff_that_ends_with_its_first_token_is_not_pinned() -> None:
    scheduler = scheduler_with()
    scheduler.submit(sequence_of(1, 20, handoff=True, max_tokens=1))
    outcome = step(scheduler)
    assert outcome.finish == [LENGTH] and outcome.kv_ready == []
    assert scheduler.load() == [0, 0, 0, 64, 0]


def test_a_pulled_request_decodes_once_its_pages_are_here() -> None:
    scheduler = scheduler_with()
    pulled = sequence_of(1, 32)
    pulled.token_ids.append(7)
    assert scheduler.begin_pull(pulled)
    assert len(pulled.block_ids) == 3 and scheduler.next_batch() is None
    scheduler.finish_pull(1)
    assert plan(scheduler) == [(1, 32, 1, True)]


def test_a_pull_is_refused_without_room_and_takes_nothing() -> None:
    scheduler = scheduler_with(num_blocks=8, max_model_len=128)
    assert scheduler.begin_pull(sequence_of(1, 60, max_tokens=8))
    assert not scheduler.begin_pull(sequence_of(2, 60, max_tokens=8)), "would leave no watermark"
    assert scheduler.begin_pull(sequence_of(3, 40, max_tokens=8))
    scheduler.check()


def test_a_pull_is_refused_when_all_places_are_taken() -> None:
    scheduler = scheduler_with(max_num_seqs=2)
    assert scheduler.begin_pull(sequence_of(1, 5))
    assert scheduler.begin_pull(sequence_of(2, 5))
    assert not scheduler.begin_pull(sequence_of(3, 5))


def test_the_youngest_gives_its_blocks_to_an_elder() -> None:
    scheduler = scheduler_with(num_blocks=4, max_model_len=64)
    for request_id in (1, 2):
        scheduler.submit(sequence_of(request_id, 16, max_tokens=48))
    scheduler.submit(sequence_of(3, 32, max_tokens=32))
    step(scheduler)  # both are at 17 tokens, each needs a second block in the next step
    batch = scheduler.next_batch()
    assert batch is not None and batch.preempted == [] and batch.num_decodes == 2
    scheduler.commit(batch, [5, 5])
    while batch.preempted == []:
        batch = scheduler.next_batch()
        assert batch is not None
        scheduler.commit(batch, [5] * len(batch.sampled))
        scheduler.check()
    assert batch.preempted == [2]
    assert [work.sequence.request_id for work in batch.work] == [1]


def test_a_half_computed_prompt_gives_way_before_an_older_decode() -> None:
    scheduler = scheduler_with(
        num_blocks=5, max_model_len=80, max_num_seqs=2, max_num_batched_tokens=2
    )
    scheduler.submit(sequence_of(1, 2, max_tokens=60))
    step(scheduler)
    scheduler.submit(sequence_of(2, 47, handoff=True))
    preempted: list[int] = []
    while not preempted:
        assert scheduler.load()[1] == 1, "the prompt is half computed"
        batch = scheduler.next_batch()
        assert batch is not None
        preempted = batch.preempted
        scheduler.commit(batch, [5] * len(batch.sampled))
        scheduler.check()
    assert preempted == [2]


def test_the_only_sequence_waits_for_pinned_blocks_instead_of_giving_up() -> None:
    scheduler = scheduler_with(num_blocks=3, max_model_len=48)
    scheduler.submit(sequence_of(1, 16, max_tokens=32))
    step(scheduler)
    scheduler.submit(sequence_of(2, 15, handoff=True))
    step(scheduler)
    assert scheduler.load()[2] == 0, "a newcomer leaves a block to the one that decodes"
    scheduler = scheduler_with(num_blocks=3, max_model_len=48)
    scheduler.submit(sequence_of(2, 30, handoff=True))
    step(scheduler)
    scheduler.submit(sequence_of(1, 16, max_tokens=32))
    step(scheduler)
    assert scheduler.next_batch() is None
    scheduler.release(2)
    assert plan(scheduler) == [(1, 16, 1, True)]


def test_what_can_never_run_is_refused_at_arrival() -> None:
    scheduler = scheduler_with(num_blocks=4)
    with pytest.raises(OutOfBlocks):
        scheduler.submit(sequence_of(1, 30, max_tokens=40))
    with pytest.raises(OutOfBlocks):
        scheduler.begin_pull(sequence_of(1, 30, max_tokens=40))
    scheduler.submit(sequence_of(1, 30, handoff=True, max_tokens=400))
    with pytest.raises(PromptTooLong):
        scheduler.submit(sequence_of(2, 512))
    assert scheduler.load()[1] == 1
    scheduler.check()


def test_a_budget_below_the_number_of_sequences_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="max-num-seqs"):
        scheduler_with(max_num_batched_tokens=4)


@pytest.mark.parametrize(
    ("sampling", "tokens", "finish"),
    [
        ({"max_tokens": 3}, [5, 5, 5], LENGTH),
        ({}, [5, EOS], STOP),
        ({"ignore_eos": True, "max_tokens": 3}, [5, EOS, 5], LENGTH),
        ({"stop_token_ids": (9,)}, [5, 9], STOP),
        ({"stop_token_ids": (9,), "ignore_eos": True}, [EOS, 9], STOP),
        ({"min_tokens": 2}, [EOS, EOS, EOS], STOP),
        ({"max_tokens": 500}, [5] * 12, LENGTH),  # the context is full
    ],
)
def test_when_a_request_ends(sampling: dict[str, Any], tokens: list[int], finish: int) -> None:
    scheduler = scheduler_with(max_model_len=32)
    scheduler.submit(sequence_of(1, 20, **sampling))
    coming = iter(tokens)
    ends = [step(scheduler, lambda one: next(coming)).finish[0] for _ in tokens]
    assert ends == [GOES_ON] * (len(tokens) - 1) + [finish]
    assert scheduler.load() == [0, 0, 0, 64, 0]


def test_max_tokens_counts_from_the_prompt_when_a_request_comes_back() -> None:
    scheduler = scheduler_with()
    back = sequence_of(1, 20, max_tokens=5)
    back.token_ids.extend([5, 5, 5])
    scheduler.submit(back)
    assert step(scheduler).finish == [GOES_ON]
    assert step(scheduler).finish == [LENGTH]


@pytest.mark.parametrize("stage", [Stage.WAITING, Stage.RUNNING, Stage.PULLING, Stage.PINNED, None])
def test_a_cancel_frees_everything_in_every_stage(stage: Stage | None) -> None:
    scheduler = scheduler_with()
    one = sequence_of(1, 70, handoff=stage is Stage.PINNED)
    if stage is Stage.PULLING:
        assert scheduler.begin_pull(one)
    elif stage is not None:
        scheduler.submit(one)
        for _ in range(1 if stage is Stage.WAITING else 3):
            step(scheduler)
        assert one.stage is stage
    scheduler.cancel(1)
    scheduler.check()
    assert scheduler.load() == [0, 0, 0, 64, 0]
    assert scheduler.next_batch() is None


def test_refused_requests_leave_no_trace() -> None:
    scheduler = scheduler_with(num_blocks=2)
    for request_id in range(5):
        with pytest.raises(NodeServeError):
            scheduler.submit(sequence_of(request_id, 100))
    assert scheduler.next_batch() is None
    scheduler.check()
