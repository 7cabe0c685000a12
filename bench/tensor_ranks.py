"""A model's step on two tensor ranks, each a process with one core. Part of bench.step.

What the two say to each other meanwhile is measured by itself in bench/team_step.py.
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nodeserve.config import ModelConfig
from nodeserve.layout import Shape
from nodeserve.model import kv, parallel
from nodeserve.model.dummy import DummyWeights
from nodeserve.model.group import Groups
from nodeserve.model.inputs import StepInputs
from nodeserve.model.ops_cpu import CpuOps
from nodeserve.shards import Place, Shard
from tests.reference import ranks

NUM_RANKS = 2
DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Shared:
    """One kind of step on all ranks together; the time is the leader's best."""

    name: str
    ms: float
    one_worker_ms: float


def best_ms(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def one_rank(
    place: Place,
    groups: Groups,
    config: ModelConfig,
    kinds: Sequence[tuple[str, StepInputs]],
    block_size: int,
    repeats: int,
) -> list[float]:
    """Milliseconds a step of each kind."""
    cpu = sorted(os.sched_getaffinity(0))[place.rank]
    os.sched_setaffinity(0, [cpu])
    shard = Shard(config, place)
    ops = CpuOps(shard.config, DTYPE, 1, [cpu])
    model = parallel.build(shard, DummyWeights(config, DTYPE), ops, groups)
    layout = kv.layout_of(config, block_size, DTYPE, shard)
    most_blocks = max(1 + int(inputs.block_table.max()) for _, inputs in kinds)
    cache = ops.cache(layout, torch.zeros(most_blocks * layout.block_bytes, dtype=torch.uint8))
    found = []
    for _, inputs in kinds:
        model.forward(inputs, cache)
        found.append(best_ms(partial(model.forward, inputs, cache), repeats))
    return found


def measure(
    config: ModelConfig,
    kinds: Sequence[tuple[str, StepInputs, float]],
    block_size: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """kinds: a name, its inputs, and what one worker takes on one core, in ms."""
    if len(os.sched_getaffinity(0)) < NUM_RANKS:
        print(f"tp{NUM_RANKS} needs {NUM_RANKS} cores")
        return []
    plain = [(name, inputs) for name, inputs, _ in kinds]
    with tempfile.TemporaryDirectory() as folder:
        arguments = (config, plain, block_size, repeats)
        leader = ranks.run(Shape(tp=NUM_RANKS), Path(folder), one_rank, *arguments)[0]
    rows = [
        Shared(name, ms, one_worker_ms)
        for (name, _, one_worker_ms), ms in zip(kinds, leader, strict=True)
    ]
    for row in rows:
        print(
            f"tp{NUM_RANKS}, bfloat16, {row.name:15} {row.ms:7.2f} ms, "
            f"{row.one_worker_ms / row.ms:.2f} times as fast as one worker on one core"
        )
    return [asdict(row) for row in rows]
