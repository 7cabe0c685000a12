"""Steps on their way through several stages of GPUs, on the fake runtime: late, in any order."""

import json
import math
import os
import threading
from array import array
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import distributed

from nodeserve.model.group import Alone as Nobody
from nodeserve.model.group import Groups
from nodeserve.model.inputs import StepInputs
from nodeserve.policy.batching import Batch, Sequence, Work
from nodeserve.policy.chunks import attention_weight
from nodeserve.types import Sampling
from nodeserve.worker import meeting
from nodeserve.worker.contract import Alone
from nodeserve.worker.device_cuda import load
from nodeserve.worker.executor import ModelExecutor
from nodeserve.worker.executor_cuda import CudaExecutor, Together
from nodeserve.worker.ranks import NoRanks
from tests.fakes.cuda_worker import plain_parts
from tests.fakes.gpu_runtime import FakeRuntime
from tests.fakes.harness import default_spec
from tests.patience import PATIENCE_S
from tests.reference.export import config_json
from tests.reference.test_cuda_executor import (
    SPARE,
    TINY,
    VOCAB,
    Argmax,
    feed_tokens,
    staging_of,
)


class Stage:
    """A model that remembers what it was asked; a step's most likely token is its first one."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self._advanced: deque[int] = deque()

    def advance(self, inputs: StepInputs, cache: Any) -> None:
        self._advanced.append(int(inputs.token_ids[0]))
        self.calls.append(("advance", self._advanced[-1]))

    def logits(self, num_rows: int) -> torch.Tensor:
        first = self._advanced.popleft()
        self.calls.append(("logits", num_rows))
        logits = torch.zeros(num_rows, VOCAB)
        logits[:, first] = 1.0
        return logits


class Team(Alone):
    """Remembers what it was told; the last stage is as far as the test says."""

    def __init__(self) -> None:
        self.plans: list[bytes] = []
        self.passed = self.num_choices = 0

    def step(self, plan: Any) -> int:
        self.plans.append(plan())
        return len(self.plans)

    def choose(self) -> None:
        self.num_choices += 1

    def has_passed(self, number: int) -> bool:
        return self.passed >= number


def executor_of(runtime: FakeRuntime, **together: Any) -> tuple[CudaExecutor, Stage, Team]:
    model, team = Stage(), Team()
    executor = CudaExecutor(
        runtime,
        model,
        staging_of(runtime, num_steps=3),
        Argmax(),
        feed_tokens,
        Together(num_stages=3, **together),
    )
    executor.use(None, SPARE)
    executor.team = team
    return executor, model, team


def chunk(first: int, samples: bool = True) -> Batch:
    sequence = Sequence(first, array("i", [first] * 4), 4, Sampling(temperature=0.0))
    sequence.block_ids.append(first)
    return Batch([Work(sequence, 0, 4 if samples else 3, samples)], num_prefill_tokens=4)


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


def test_each_stage_has_a_step_and_tokens_come_when_the_last_has_passed(
    runtime: FakeRuntime,
) -> None:
    executor, model, team = executor_of(runtime)
    flights = [executor.launch(chunk(first, first != 22)) for first in (11, 22, 33)]
    runtime.mark()  # all that was submitted is over
    assert model.calls == [("advance", 11), ("advance", 22), ("advance", 33)]
    assert not flights[0].done() and team.num_choices == 0, "the rows are not here"
    team.passed = 1
    assert not flights[0].done(), "the choice is submitted, and waits for nobody on the host"
    assert team.num_choices == 1 and len(model.calls) == 3
    flights.append(executor.launch(chunk(44)))
    assert flights[0].result().token_ids == [11]
    assert flights[0].done() and team.num_choices == 1, "it is begun once"
    team.passed = 4
    assert [flight.result().token_ids for flight in flights[1:]] == [[], [33], [44]]
    assert model.calls[3:5] == [("logits", 1), ("advance", 44)]
    assert [rows for name, rows in model.calls if name == "logits"] == [1, 0, 1, 1]


def test_who_stops_needs_no_word_of_the_last_stage(runtime: FakeRuntime) -> None:
    """Tokens are on their way and are waited for on the device."""
    executor, _, team = executor_of(runtime)
    assert executor.launch(chunk(11)).result().token_ids == [11]
    assert team.num_choices == 1


@pytest.mark.parametrize("has_results", [True, False])
def test_a_follower_says_when_its_rows_are_computed(
    runtime: FakeRuntime, has_results: bool
) -> None:
    _leader, _, team = executor_of(FakeRuntime())
    for first in (11, 22):
        _leader.launch(chunk(first))
    follower, model, _ = executor_of(runtime, leads=False, has_results=has_results)
    for plan in team.plans:
        follower.follow(plan)
    assert follower.num_passed() == 0 and model.calls == []
    runtime.mark()
    assert [follower.num_passed(), follower.num_passed()] == [2 if has_results else 0, 0]
    follower.choose()
    follower.choose()
    runtime.mark()
    assert model.calls == [("advance", 11), ("advance", 22), ("logits", 1), ("logits", 1)]


def test_a_follower_is_woken_when_its_rows_are_computed(runtime: FakeRuntime) -> None:
    leader, _, team = executor_of(FakeRuntime())
    leader.launch(chunk(11))
    follower, _, _ = executor_of(runtime, leads=False, has_results=True)
    woken = threading.Semaphore(0)
    follower.on_done(woken.release)
    follower.follow(team.plans[0])
    assert woken.acquire(timeout=PATIENCE_S)  # the watcher computed it: nobody else waited
    assert follower.num_passed() == 1


class Late(NoRanks):
    """Some have to enter the last pass."""

    def opens_s(self) -> float:
        return math.inf


def test_no_step_is_planned_before_other_ranks_are_in_the_last_one(runtime: FakeRuntime) -> None:
    executor, model, _ = executor_of(runtime, ranks=Late())
    on_cpus = ModelExecutor(cast(Any, model), None, cast(Any, None), ranks=Late())
    assert executor.opens_s() == on_cpus.opens_s() == math.inf
    assert executor_of(runtime)[0].opens_s() == -math.inf


def test_the_warm_up_goes_through_all_stages_in_one_order(runtime: FakeRuntime) -> None:
    """By itself, as every member does: no word is sent, and each step ends before the next."""
    executor, model, _ = executor_of(runtime)
    executor.team = Alone()
    executor.warm_up(96, 6, 128, 16, 101)
    names = [name for name, _ in model.calls]
    assert names == ["advance", "logits"] * (len(names) // 2) and len(names) == 6


class Loop:
    """A pipe of one stage alone: what comes back is zeros."""

    def send(self, x: torch.Tensor) -> None: ...

    def receive_back(self, out: torch.Tensor) -> None:
        out.zero_()


def test_a_worker_among_stages_has_as_many_steps_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(TINY, num_layers=2)
    (tmp_path / "config.json").write_text(json.dumps(config_json(config)))
    rendezvous = os.memfd_create("rendezvous")
    spec = default_spec(
        model=str(tmp_path),
        load_format="dummy",
        dtype="float32",
        device="cuda",
        gpus=(0,),
        kv_memory=1 << 20,
        pp=2,
        rendezvous_fd=rendezvous,
    )
    groups = Groups(Nobody(), Nobody(), Loop())  # type: ignore[arg-type]
    monkeypatch.setattr(meeting, "connect", lambda *arguments: groups)
    store = distributed.FileStore(f"/proc/self/fd/{rendezvous}", 2)  # type: ignore[attr-defined]
    store.set("blocks.1", "7")  # the other stage has room for fewer
    try:
        device = load(spec, lambda *told: None, Alone(), FakeRuntime(), plain_parts)
    finally:
        os.close(rendezvous)
    assert (device.num_stages, device.num_blocks) == (2, 7)
    assert device.attention_weight == attention_weight(config)
