"""A model's step on two tensor ranks, and what their collectives take of it. Part of bench.step.

Each rank is a process with one core. A step's collectives are noted, then made again by themselves,
of the same sizes in the same order: what a step would still take if its products were free.
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nodeserve.config import ModelConfig
from nodeserve.layout import Shape
from nodeserve.model import kv, parallel
from nodeserve.model.dummy import DummyWeights
from nodeserve.model.group import Group, Groups
from nodeserve.model.inputs import StepInputs
from nodeserve.model.ops_cpu import CpuOps
from nodeserve.shards import Place, Shard
from tests.reference import ranks

NUM_RANKS = 2
DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Shared:
    """One kind of step on all ranks together; times are the leader's best."""

    name: str
    ms: float
    num_collectives: int
    collectives_us: float
    one_worker_ms: float


class Recorder:
    """A group that notes what it is asked for."""

    def __init__(self, group: Group) -> None:
        self.rank, self.size = group.rank, group.size
        self.calls: list[Callable[[], None]] = []
        self.notes = True
        self._group = group

    def all_reduce(self, x: torch.Tensor) -> None:
        self._note(partial(self._group.all_reduce, torch.zeros_like(x)))
        self._group.all_reduce(x)

    def gather(self, x: torch.Tensor, out: torch.Tensor | None) -> None:
        target = None if out is None else torch.zeros_like(out)
        self._note(partial(self._group.gather, torch.zeros_like(x), target))
        self._group.gather(x, out)

    def all_to_all(self, *arguments: Any) -> None:
        raise NotImplementedError("no experts here")

    def _note(self, call: Callable[[], None]) -> None:
        if self.notes:
            self.calls.append(call)

    def replay(self) -> None:
        for call in self.calls:
            call()


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
) -> list[tuple[float, int, float]]:
    """Of each kind: milliseconds a step, how many collectives it has, milliseconds of those."""
    cpu = sorted(os.sched_getaffinity(0))[place.rank]
    os.sched_setaffinity(0, [cpu])
    shard = Shard(config, place)
    ops = CpuOps(shard.config, DTYPE, 1, [cpu])
    recorder = Recorder(groups.tp)
    source = DummyWeights(config, DTYPE)
    model = parallel.build(shard, source, ops, replace(groups, tp=recorder))
    layout = kv.layout_of(config, block_size, DTYPE, shard)
    most_blocks = max(1 + int(inputs.block_table.max()) for _, inputs in kinds)
    cache = ops.cache(layout, torch.zeros(most_blocks * layout.block_bytes, dtype=torch.uint8))
    found = []
    for _, inputs in kinds:
        recorder.calls.clear()
        model.forward(inputs, cache)
        recorder.notes = False
        step_ms = best_ms(partial(model.forward, inputs, cache), repeats)
        recorder.notes = True
        found.append((step_ms, len(recorder.calls), best_ms(recorder.replay, repeats)))
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
        Shared(name, step_ms, count, 1e3 * collectives_ms, one_ms)
        for (name, _, one_ms), (step_ms, count, collectives_ms) in zip(kinds, leader, strict=True)
    ]
    for row in rows:
        print(
            f"tp{NUM_RANKS}, bfloat16    {row.name:15} {row.ms:7.2f} ms (one worker "
            f"{row.one_worker_ms:.2f})   {row.num_collectives} collectives alone "
            f"{row.collectives_us:.0f} us ({row.collectives_us / row.ms / 10:.0f}%),"
            f" {row.collectives_us / row.num_collectives:.1f} us each"
        )
    return [asdict(row) for row in rows]
