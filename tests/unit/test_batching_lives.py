"""Two schedulers, the fake model and random lives: arrivals, cancels, pulls, preemptions, stops.

Once with steps that are over when they are launched, once with a device that computes later than
it is told: then everything else happens while one or two steps are on their way.
"""

import random
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from nodeserve.policy.batching import Batch, Limits, Outcome, Sequence
from nodeserve.policy.scheduler import Scheduler
from nodeserve.types import Sampling
from tests.fakes.late_model import LateExecutor, LateFlight
from tests.fakes.model import ENTRY_BYTES, VOCAB_SIZE, FakeExecutor, FakeSettings, expected_stream
from tests.repeats import repeats, seeds

BLOCK = 16
CONTEXT = 160


@dataclass
class Life:
    """A request as the coordinator knows it."""

    prompt: list[int]
    sampling: Sampling
    emitted: list[int] = field(default_factory=list)
    place: str = "queue"  # queue, source, parked, target, done, cancelled

    @property
    def expected(self) -> list[int]:
        """Up to and with the first stop token."""
        room = CONTEXT - len(self.prompt)
        stream = expected_stream(self.prompt, min(self.sampling.max_tokens, room))
        stops = self.sampling.stop_token_ids
        ends = [place for place, token in enumerate(stream, 1) if token in stops]
        return stream[: ends[0]] if ends else stream


class Side:
    """One worker without a process: the real scheduler, the fake model, a pool."""

    def __init__(self, num_blocks: int, max_num_seqs: int, budget: int) -> None:
        limits = Limits(num_blocks, BLOCK, CONTEXT, max_num_seqs, budget)
        self.scheduler = Scheduler(limits)
        self.pool = bytearray(num_blocks * BLOCK * ENTRY_BYTES)
        self.executor = FakeExecutor(FakeSettings(), self.pool, BLOCK)

    @property
    def at_rest(self) -> bool:
        return True

    def step(self, rng: random.Random) -> tuple[Batch, Outcome] | None:
        batch = self.scheduler.next_batch()
        if batch is None:
            return None
        outcome = self.scheduler.commit(batch, self.executor.launch(batch).result().token_ids)
        return batch, outcome


class LateSide(Side):
    """A worker whose steps end later than they are launched; one may be launched ahead."""

    def __init__(self, num_blocks: int, max_num_seqs: int, budget: int) -> None:
        super().__init__(num_blocks, max_num_seqs, budget)
        self.device = LateExecutor(FakeSettings(), self.pool, BLOCK)
        self.flights: deque[LateFlight] = deque()
        self.num_ahead = 0

    @property
    def at_rest(self) -> bool:
        return not self.flights

    def step(self, rng: random.Random) -> tuple[Batch, Outcome] | None:
        """One of: the device computes, the host plans, the host reads what was computed."""
        done: tuple[Batch, Outcome] | None = None
        match rng.randrange(3):
            case 0 if self.device.on_the_way:
                self.device.compute_one()
            case 1 if len(self.flights) < 2:
                self._launch()
            case 2 if self.flights and self.flights[0].done():
                flight = self.flights.popleft()
                done = flight.batch, self.scheduler.commit(flight.batch, flight.result().token_ids)
        self._check_written_blocks()
        return done

    def _launch(self) -> None:
        ahead = len(self.flights) == 1
        batch = self.scheduler.next_batch(ahead=ahead)
        if batch is None:
            return
        assert not (ahead and batch.preempted)
        assert not any(w.feed is not None and w.sequence.sampling.needs_tokens for w in batch.work)
        self.num_ahead += ahead
        self.flights.append(self.device.launch(batch))

    def _check_written_blocks(self) -> None:
        """Whatever the scheduler believes: no block of a step on its way is anybody else's."""
        free = set(self.scheduler.blocks._free)
        for flight in self.device.on_the_way:
            for row, work in zip(flight.rows, flight.batch.work, strict=True):
                assert free.isdisjoint(row.block_ids)
                assert row.block_ids == work.sequence.block_ids[: len(row.block_ids)]


class Simulation:
    """A prefill and a decode worker, and random requests, cancels, pulls and pauses."""

    def __init__(self, seed: int, side: type[Side]) -> None:
        self.rng = random.Random(seed)
        budget = self.rng.choice([8, 21, 64])
        self.source = side(self.rng.randint(12, 40), 8, budget)
        self.target = side(self.rng.randint(11, 18), self.rng.randint(4, 8), budget)
        self.lives: dict[int, Life] = {}
        self.pins: dict[int, array[int]] = {}
        self.pulling: list[tuple[int, array[int]]] = []
        self.num_preempted = 0
        self.next_id = 0

    def arrive(self) -> None:
        prompt = [self.rng.randrange(1, 900) for _ in range(self.rng.randint(1, 100))]
        sampling = Sampling(
            max_tokens=self.rng.randint(1, 100),
            stop_token_ids=tuple(
                self.rng.sample(range(VOCAB_SIZE), self.rng.choice([0, 0, 5, 40]))
            ),
            presence_penalty=self.rng.choice([0.0] * 19 + [0.5]),  # the fake model ignores it
        )
        life = Life(prompt, sampling)
        self.lives[self.next_id] = life
        self._enter(self.next_id, life)
        self.next_id += 1

    def _sequence(self, request_id: int, handoff: bool) -> Sequence:
        life = self.lives[request_id]
        tokens = array("i", life.prompt + life.emitted)
        return Sequence(request_id, tokens, len(life.prompt), life.sampling, handoff)

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
        done = side.step(self.rng)
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
            if self.lives[request_id].place != "cancelled":
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
        for _ in range(40_000):
            ended = all(life.place in ("done", "cancelled") for life in self.lives.values())
            if ended and self.source.at_rest and self.target.at_rest:
                return
            for action in (self.begin_pull, self.finish_pull):
                action()
            self.step(self.source)
            self.step(self.target)
        raise AssertionError([life.place for life in self.lives.values()])


@pytest.mark.repeats
@pytest.mark.parametrize("side", [Side, LateSide])
@pytest.mark.parametrize("seed", seeds(2, repeats(8, 64)))
def test_random_lives_end_once_with_the_right_tokens(seed: int, side: type[Side]) -> None:
    simulation = Simulation(seed, side)
    for _ in range(3000 if side is Side else 6000):
        simulation.act()
    simulation.run_out()
    for life in simulation.lives.values():
        if life.place == "done":
            assert life.emitted == life.expected
        else:
            assert life.emitted == life.expected[: len(life.emitted)]
    for worker in (simulation.source, simulation.target):
        limits = worker.scheduler.limits
        worker.scheduler.check()
        assert worker.scheduler.load() == [0, 0, 0, limits.num_blocks, 0]
    assert simulation.num_preempted > 0
    if isinstance(simulation.target, LateSide):
        assert simulation.target.num_ahead > 100
