"""Chunks of equal cost: by arithmetic, and as a scheduler cuts a long prompt for stages."""

import pytest

from nodeserve.policy.chunks import chunk_cost, longest_chunk
from tests.unit.test_batching import sequence_of
from tests.unit.test_batching_ahead import commit, launch, running


@pytest.mark.parametrize("weight", [0.0, 1e-5, 1e-3, 0.1])
@pytest.mark.parametrize("context", [0, 1, 1000, 100_000])
@pytest.mark.parametrize("cost", [0.0, 1.0, 7.5, 128.0, 8192.0])
def test_the_longest_chunk_fits_and_one_more_token_does_not(
    weight: float, context: int, cost: float
) -> None:
    count = longest_chunk(cost, context, weight)
    assert chunk_cost(count, context, weight) <= cost * (1 + 1e-6) + 1e-6
    assert chunk_cost(count + 1, context, weight) > cost


def sizes(weight: float) -> list[int]:
    """Chunks of one prompt of 400 tokens."""
    scheduler = running(
        num_stages=2, attention_weight=weight, max_num_batched_tokens=64, max_num_seqs=4
    )
    scheduler.submit(sequence_of(1, 400))
    batches, cut = [launch(scheduler)], []
    while batches:
        cut.append(batches[0].num_prefill_tokens)
        if (behind := scheduler.next_batch(ahead=True)) is not None:
            batches.append(behind)
        batch = batches.pop(0)
        commit(scheduler, batch, *[9] * len(batch.sampled))
    return cut


def test_without_attention_chunks_have_equally_many_tokens() -> None:
    assert sizes(0.0) == [64] * 6 + [16]


def test_chunks_of_a_long_prompt_get_shorter_and_take_equally_long() -> None:
    cut = sizes(0.01)
    assert sum(cut) == 400 and cut[0] == 64 and cut == sorted(cut, reverse=True)
    costs = [chunk_cost(count, sum(cut[:place]), 0.01) for place, count in enumerate(cut)]
    assert max(costs[:-1]) - min(costs[:-1]) < 0.1 * costs[0]


def test_a_prompt_gets_on_however_expensive_its_tokens_are() -> None:
    cut = sizes(100.0)
    assert sum(cut) == 400 and cut[0] == 64 and min(cut) >= 1


@pytest.mark.parametrize("weight", [0.01, -0.001])
def test_nobody_overtakes_a_prompt_whose_chunk_was_cut(weight: float) -> None:
    """What was left of the pass was too little for its next token, and enough for a whole prompt
    of one: that ended first, which ended the worker."""
    scheduler = running(
        num_stages=2, attention_weight=weight, max_num_batched_tokens=64, max_num_seqs=4
    )
    for request_id, num_tokens in ((1, 400), (2, 1)):
        scheduler.submit(sequence_of(request_id, num_tokens))
    ended: list[int] = []
    while (batch := scheduler.next_batch()) is not None and len(ended) < 2:
        ended += commit(scheduler, batch, *[9] * len(batch.sampled)).request_ids
        scheduler.check()
    assert ended[:2] == [1, 2]
