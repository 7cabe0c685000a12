"""The real model behind the real scheduler: the same bits, whatever a request went through.

In one process, so that every logit can be looked at: the scheduler, the staging, the pages, the
handoff's copies and the sampler are the worker's own. A request is the same alone or among 20,
chunked or whole, preempted or not, handed over or not; greedy or drawn with a seed.
"""

import random
from array import array
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from nodeserve import _host
from nodeserve.checkpoint import resolve
from nodeserve.errors import ConfigError
from nodeserve.model import backend, families, kv
from nodeserve.model.loader import open_weights
from nodeserve.policy.batching import Limits, Sequence
from nodeserve.policy.scheduler import Scheduler
from nodeserve.types import Sampling
from nodeserve.worker.executor import ModelExecutor
from nodeserve.worker.inputs import Staging
from tests.reference.embedded import needs_embedded_model

pytestmark = needs_embedded_model

BLOCK, CONTEXT, NUM_TOKENS = 16, 256, 10


class Recorder:
    """A model that remembers the logits it gave."""

    def __init__(self, model: families.Model) -> None:
        self.model = model
        self.last = torch.empty(0)
        self.advance = model.advance

    def logits(self, num_rows: int) -> torch.Tensor:
        logits = self.model.logits(num_rows)
        self.last = logits.clone()
        return logits


@dataclass
class Seen:
    """What one request got: tokens, and the logits that each was chosen from."""

    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


class Lab:
    """A loaded model, and workers over it."""

    def __init__(self, dtype: torch.dtype) -> None:
        found = resolve()
        self.ops = backend.make_ops(found.config, dtype)
        self.layout = kv.layout_of(found.config, BLOCK, dtype)
        self.model = families.build(found.config, open_weights(found, dtype), self.ops)

    def worker(self, num_blocks: int, budget: int) -> "Worker":
        return Worker(self, num_blocks, budget)


class Worker:
    def __init__(self, lab: Lab, num_blocks: int, budget: int) -> None:
        self.pool = bytearray(num_blocks * lab.layout.block_bytes)
        self.recorder = Recorder(lab.model)
        cache = lab.ops.cache(lab.layout, self.pool)
        staging = Staging(budget, 32, CONTEXT // BLOCK)
        self.executor = ModelExecutor(self.recorder, cache, staging)  # type: ignore[arg-type]
        self.scheduler = Scheduler(Limits(num_blocks, BLOCK, CONTEXT, min(32, budget), budget))
        self.pinned: dict[int, array[int]] = {}
        self.preempted: list[int] = []

    def step(self, seen: dict[int, Seen]) -> bool:
        batch = self.scheduler.next_batch()
        if batch is None:
            return False
        outcome = self.scheduler.commit(batch, self.executor.launch(batch).result().token_ids)
        self.preempted.extend(batch.preempted)
        self.pinned.update(outcome.kv_ready)
        for row, request_id in enumerate(outcome.request_ids):
            seen[request_id].tokens.append(outcome.token_ids[row])
            seen[request_id].logits.append(self.recorder.last[row])
        return True


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def lab(request: pytest.FixtureRequest) -> Lab:
    return Lab(request.param)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(49_000) for _ in range(rng.randint(2, 90))] for _ in range(20)]


@pytest.fixture(scope="module")
def alone(lab: Lab, prompts: list[list[int]]) -> dict[int, Seen]:
    """Every request by itself, its prompt in one piece."""
    worker, seen = lab.worker(16, 128), {i: Seen() for i in range(len(prompts))}
    for request_id in range(len(prompts)):
        worker.scheduler.submit(sequence_of(prompts, request_id))
        while worker.step(seen):
            pass
    return seen


def sequence_of(
    prompts: list[list[int]], request_id: int, emitted: list[int] | None = None, **more: Any
) -> Sequence:
    values: dict[str, Any] = (
        {"temperature": 0.0} if request_id % 2 else {"seed": request_id, "top_p": 0.95}
    )
    sampling = Sampling(max_tokens=NUM_TOKENS, **values)
    prompt = prompts[request_id]
    return Sequence(request_id, array("i", prompt + (emitted or [])), len(prompt), sampling, **more)


def assert_same_bits(seen: dict[int, Seen], alone: dict[int, Seen]) -> None:
    for request_id, one in seen.items():
        assert one.tokens == alone[request_id].tokens
        for place, logits in enumerate(one.logits):
            assert torch.equal(logits, alone[request_id].logits[place]), (request_id, place)


@pytest.mark.parametrize("budget", [512, 37], ids=["whole", "chunked"])
def test_all_at_once(
    lab: Lab, prompts: list[list[int]], alone: dict[int, Seen], budget: int
) -> None:
    worker, seen = lab.worker(256, budget), {i: Seen() for i in range(len(prompts))}
    for request_id in range(len(prompts)):
        worker.scheduler.submit(sequence_of(prompts, request_id))
    while worker.step(seen):
        pass
    assert_same_bits(seen, alone)


def test_preempted(lab: Lab, prompts: list[list[int]], alone: dict[int, Seen]) -> None:
    """A pool for about a third of the requests: the others are recomputed with what they have."""
    worker, seen = lab.worker(20, 64), {i: Seen() for i in range(16)}
    for request_id in range(16):
        worker.scheduler.submit(sequence_of(prompts, request_id))
    num_preempted = 0
    while worker.step(seen):
        for request_id in worker.preempted:
            again = sequence_of(prompts, request_id, emitted=seen[request_id].tokens)
            worker.scheduler.submit(again)
        num_preempted += len(worker.preempted)
        worker.preempted.clear()
    assert num_preempted > 0
    assert_same_bits(seen, alone)


def test_handed_over(lab: Lab, prompts: list[list[int]], alone: dict[int, Seen]) -> None:
    """Prefilled on one worker, decoded on another that is busy with earlier ones."""
    source, target = lab.worker(64, 64), lab.worker(128, 64)
    seen = {i: Seen() for i in range(16)}
    for request_id in range(16):
        source.scheduler.submit(sequence_of(prompts, request_id, handoff=True))
    while source.step(seen) or target.step(seen):
        for request_id, block_ids in list(source.pinned.items()):
            pulled = sequence_of(prompts, request_id, emitted=seen[request_id].tokens)
            if target.scheduler.begin_pull(pulled):
                here = pulled.block_ids[: len(block_ids)]
                size = lab.layout.block_bytes
                runs = [(0, 0, size)]
                _host.copy_blocks(target.pool, source.pool, size, size, runs, here, block_ids)
                target.scheduler.finish_pull(request_id)
                source.scheduler.release(request_id)
                del source.pinned[request_id]
        target.step(seen)
    assert_same_bits(seen, alone)


def test_an_unknown_data_type_is_refused_with_the_known_ones() -> None:
    assert kv.dtype_named("float16") is torch.float16
    with pytest.raises(ConfigError, match="dtype 'int8': use bfloat16, float16, float32"):
        kv.dtype_named("int8")
