"""A step as a leader's record, and steps of several stages, with a model that only counts."""

from typing import Any

import numpy as np
import pytest
import torch

from nodeserve.model.inputs import StepInputs
from nodeserve.policy.batching import Batch, Work
from nodeserve.worker.contract import Alone
from nodeserve.worker.executor import ModelExecutor, ModelFollower
from nodeserve.worker.inputs import Staging
from nodeserve.worker.plans import PlanReader, packed
from tests.unit.test_batching import sequence_of


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def same(one: StepInputs, other: StepInputs) -> bool:
    names = StepInputs.__slots__
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def batch_of(*requests: tuple[int, int, bool]) -> Batch:
    """Prompts by id: so many tokens, and whether their last one is sampled."""
    batch = Batch()
    for request_id, count, samples in requests:
        sequence = sequence_of(request_id, count, temperature=0.0)
        sequence.block_ids.extend(range(10 * request_id, 10 * request_id + 1 + count // 16))
        batch.work.append(Work(sequence, 0, count, samples))
        batch.num_prefill_tokens += count
    return batch


@pytest.mark.parametrize("requests", [[(1, 40, True), (2, 3, False)], [(3, 1, True)], []])
def test_a_follower_reads_what_its_leader_staged(requests: list[tuple[int, int, bool]]) -> None:
    staged = Staging(64, 4, 8).build(batch_of(*requests))
    reader = PlanReader()
    reader.read(packed(Staging(64, 4, 8).build(batch_of((4, 64, True)))))
    read = reader.read(packed(staged))
    assert same(read, staged)
    assert read.token_ids.dtype == torch.int32 and read.block_table.is_contiguous()


class Model:
    """Says in what order it was asked; logits say which step they are of."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self._advanced: list[int] = []

    def advance(self, inputs: StepInputs, cache: Any) -> None:
        self.calls.append(("advance", inputs.token_ids.numel()))

    def logits(self, num_rows: int) -> torch.Tensor:
        self.calls.append(("logits", num_rows))
        row = torch.zeros(num_rows, 8)
        row[:, 5] = 1.0
        return row


class Followers(Alone):
    """Remembers what was published; the last stage is as far as the test says."""

    def __init__(self) -> None:
        self.said: list[bytes | str] = []
        self.passed = 0

    def step(self, plan: Any) -> int:
        self.said.append(plan())
        return len(self.said)

    def choose(self) -> None:
        self.said.append("choose")

    def has_passed(self, number: int) -> bool:
        return self.passed >= number


def test_with_one_stage_a_launch_computes_the_whole_step() -> None:
    model, team = Model(), Followers()
    executor = ModelExecutor(model, None, Staging(64, 4, 8), team=team)  # type: ignore[arg-type]
    flight = executor.launch(batch_of((1, 7, True)))
    assert flight.done() and flight.result().token_ids == [5]
    assert model.calls == [("advance", 7), ("logits", 1)] and len(team.said) == 1


def test_with_stages_tokens_are_chosen_when_the_last_one_has_passed() -> None:
    model, team = Model(), Followers()
    staging = Staging(64, 4, 8)
    executor = ModelExecutor(model, None, staging, team=team, num_stages=2)  # type: ignore[arg-type]
    flights = [executor.launch(batch_of((n, n + 6, n != 2))) for n in (1, 2)]
    assert model.calls == [("advance", 7), ("advance", 8)]
    assert not flights[0].done()
    team.passed = 1
    assert flights[0].done() and not flights[1].done()
    assert flights[0].result().token_ids == [5]
    team.passed = 2
    assert flights[1].done() and flights[1].result().token_ids == []
    assert model.calls[2:] == [("logits", 1), ("logits", 0)]
    assert team.said[2:] == ["choose", "choose"]


@pytest.mark.parametrize("has_results", [True, False])
def test_a_followers_calls_are_its_leaders(has_results: bool) -> None:
    model, team = Model(), Followers()
    leader = ModelExecutor(model, None, Staging(64, 4, 8), team=team, num_stages=2)  # type: ignore[arg-type]
    for number, samples in ((1, True), (2, False)):
        leader.launch(batch_of((number, 6 + number, samples)))
    follows = Model()
    follower = ModelFollower(follows, None, 2, has_results)  # type: ignore[arg-type]
    for plan in team.said:
        assert isinstance(plan, bytes)
        follower.follow(plan)
        assert [follower.num_passed(), follower.num_passed()] == [int(has_results), 0]
    follower.choose()
    follower.choose()
    assert follows.calls == [("advance", 7), ("advance", 8), ("logits", 1), ("logits", 0)]


def test_plans_are_as_large_as_what_they_say() -> None:
    staged = Staging(64, 4, 8).build(batch_of((1, 40, True)))
    counts, table = 7, staged.block_table.numel()
    assert len(packed(staged)) == 4 * (counts + 40 + 40 + 2 + 1 + table + 1)
    assert np.frombuffer(packed(staged), np.int32)[0] == 40
