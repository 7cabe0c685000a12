"""Two schedulers, the fake model and random lives: arrivals, cancels, pulls, preemptions."""

import random
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from nodeserve.policy.batching import Batch, Limits, Outcome, Sequence
from nodeserve.policy.scheduler import Scheduler
from nodeserve.types import Sampling
from tests.fakes.model import ENTRY_BYTES, FakeExecutor, FakeSettings, expected_stream

BLOCK = 16
CONTEXT = 160


@dataclass
class Life:
    """A request as the coordinator knows it."""

    prompt: list[int]
    max_tokens: int
    emitted: list[int] = field(default_factory=list)
    place: str = "queue"  # queue, source, parked, target, done, cancelled


class Side:
    """One worker without a process: the real scheduler, the fake model, a pool."""

    def __init__(self, num_blocks: int, max_num_seqs: int, budget: int) -> None:
        limits = Limits(num_blocks, BLOCK, CONTEXT, max_num_seqs, budget)
        self.scheduler = Scheduler(limits)
        self.pool = bytearray(num_blocks * BLOCK * ENTRY_BYTES)
        self.executor = FakeExecutor(FakeSettings(), self.pool, BLOCK)

    def step(self) -> tuple[Batch, Outcome] | None:
        batch = self.scheduler.next_batch()
        if batch is None:
            return None
        outcome = self.scheduler.commit(batch, self.executor.launch(batch).result().token_ids)
        self.scheduler.check()
        return batch, outcome


class Simulation:
    """A prefill and a decode worker, and random requests, cancels, pulls and pauses."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        budget = self.rng.choice([8, 21, 64])
        self.source = Side(self.rng.randint(12, 40), 8, budget)
        self.target = Side(self.rng.randint(11, 18), self.rng.randint(4, 8), budget)
        self.lives: dict[int, Life] = {}
        self.pins: dict[int, array[int]] = {}
        self.pulling: list[tuple[int, array[int]]] = []
        self.num_preempted = 0
        self.next_id = 0

    def arrive(self) -> None:
        prompt = [self.rng.randrange(1, 900) for _ in range(self.rng.randint(1, 100))]
        life = Life(prompt, self.rng.randint(1, 100))
        self.lives[self.next_id] = life
        self._enter(self.next_id, life)
        self.next_id += 1

    def _sequence(self, request_id: int, handoff: bool) -> Sequence:
        life = self.lives[request_id]
        tokens = array("i", life.prompt + life.emitted)
        sampling = Sampling(max_tokens=life.max_tokens)
        return Sequence(request_id, tokens, len(life.prompt), sampling, handoff)

    def _enter(self, request_id: int, life: Life) -> None:
        """To the prefill worker for a handoff, or to the decode worker as to a mixed one."""
        handoff = self.rng.random() < 0.7
        side, life.place = (self.source, "source") if handoff else (self.target, "target")
        side.scheduler.submit(self._sequence(request_id, handoff))

    def cancel(self) -> None:
        alive = [key for key, life in self.lives.items() if life.place not in ("done", "cancelled")]
        if alive:
            request_id = self.rng.choice(alive)
            self.pins.pop(request_id, None)
            self.pulling = [pull for pull in self.pulling if pull[0] != request_id]
            self.source.scheduler.cancel(request_id)
            self.target.scheduler.cancel(request_id)
            self.lives[request_id].place = "cancelled"

    def begin_pull(self) -> None:
        parked = [key for key in self.pins if self.lives[key].place == "parked"]
        if parked:
            request_id = self.rng.choice(parked)
            sequence = self._sequence(request_id, handoff=False)
            if self.target.scheduler.begin_pull(sequence):
                self.lives[request_id].place = "target"
                self.pulling.append((request_id, sequence.block_ids))

    def finish_pull(self) -> None:
        if self.pulling:
            request_id, block_ids = self.pulling.pop(self.rng.randrange(len(self.pulling)))
            size = BLOCK * ENTRY_BYTES
            for here, there in zip(block_ids, self.pins.pop(request_id), strict=False):
                page = self.source.pool[there * size : (there + 1) * size]
                self.target.pool[here * size : (here + 1) * size] = page
            self.target.scheduler.finish_pull(request_id)
            self.source.scheduler.release(request_id)

    def step(self, side: Side) -> None:
        done = side.step()
        if done is None:
            return
        batch, outcome = done
        for request_id, token_id, finish in zip(
            outcome.request_ids, outcome.token_ids, outcome.finish, strict=True
        ):
            life = self.lives[request_id]
            assert life.place == ("source" if side is self.source else "target")
            life.emitted.append(token_id)
            if finish:
                life.place = "done"
        for request_id, block_ids in outcome.kv_ready:
            self.lives[request_id].place = "parked"
            self.pins[request_id] = block_ids
        self.num_preempted += len(batch.preempted)
        for request_id in batch.preempted:
            self._enter(request_id, self.lives[request_id])

    def act(self) -> None:
        actions: list[tuple[Callable[[], None], int]] = [
            (self.arrive, 3),
            (self.cancel, 1),
            (self.begin_pull, 8),
            (self.finish_pull, 8),
            (lambda: self.step(self.source), 12),
            (lambda: self.step(self.target), 40),
        ]
        choices, weights = zip(*actions, strict=True)
        self.rng.choices(choices, weights)[0]()
        self.source.scheduler.check()
        self.target.scheduler.check()

    def run_out(self) -> None:
        """No more arrivals: everything must come to its end."""
        for _ in range(20_000):
            if all(life.place in ("done", "cancelled") for life in self.lives.values()):
                return
            for action in (self.begin_pull, self.finish_pull):
                action()
            self.step(self.source)
            self.step(self.target)
        raise AssertionError([life.place for life in self.lives.values()])


@pytest.mark.parametrize("seed", range(12))
def test_random_lives_end_once_with_the_right_tokens(seed: int) -> None:
    simulation = Simulation(seed)
    for _ in range(3000):
        simulation.act()
    simulation.run_out()
    for life in simulation.lives.values():
        expected = expected_stream(life.prompt, life.max_tokens)
        room = CONTEXT - len(life.prompt)
        if life.place == "done":
            assert life.emitted == expected[:room]
        else:
            assert life.emitted == expected[: len(life.emitted)]
    for side in (simulation.source, simulation.target):
        limits = side.scheduler.limits
        assert side.scheduler.load() == [0, 0, 0, limits.num_blocks, 0]
    assert simulation.num_preempted > 0
