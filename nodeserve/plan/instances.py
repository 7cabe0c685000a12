"""Simulated instances: what workers and devices do, in virtual time.

Each DP rank has the real `Scheduler` over real blocks (decodes in bulk, see bulk.py), so chunks,
preemptions and memory are those of a live worker. The ranks of an instance run their passes
together: all plan when a pass starts, it lasts what the cost model says of the work of all, all
commit when it ends. A rank without work takes part idle. A pass cannot be interrupted; what arrives
meanwhile waits for the next one.

An instance with pipeline stages has as many passes under way, of different sequences or of chunks
of a prompt that follow each other, as real workers do (docs/instances.md). The next is planned when
the first stage is free; what a pass is told to take begins when the one before it ended.
"""

import math
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from nodeserve.plan.bulk import BulkBatch, BulkScheduler, PrefillFirst, chunks_of, work_of
from nodeserve.plan.records import Engine, Pass, Scenario
from nodeserve.policy.account import Account
from nodeserve.policy.batching import Batch, Limits
from nodeserve.policy.batching import Sequence as Tokens
from nodeserve.policy.cost import IDLE
from nodeserve.policy.pipeline import Pipeline
from nodeserve.policy.profile import Profile, pass_factor
from nodeserve.policy.units import Unit
from nodeserve.types import Load, Role


@lru_cache(maxsize=256)
def _factors(noise: float, seed: int, instance: int) -> "array[float]":
    """What is known of `pass_factor`, pass by pass: the runs of a search all ask for the same."""
    return array("d")


class RankDone(NamedTuple):
    """What one rank tells of a pass: StepDone without its tokens."""

    load: Load
    started: list[Tokens]  # those whose first chunk ran
    prefilled: list[int]  # request ids that got their first token and go on
    finished: list[int]
    preempted: list[tuple[int, int]]  # request id, tokens it has by now


class InstanceDone(NamedTuple):
    """What all ranks of an instance tell of a pass, its `step`-th."""

    record: Pass
    step: int
    ranks: list[RankDone]


class QuietDone(NamedTuple):
    """What all ranks tell of a pass in which nobody began or ended."""

    record: Pass
    step: int
    loads: list[Load]


class Flight(NamedTuple):
    """A pass under way."""

    record: Pass
    step: int
    batches: list[Batch | None]  # of each rank; None: it takes part idle
    ends_s: float


class Rank:
    """One worker: its blocks and sequences, and the link over which it pulls pages."""

    def __init__(
        self, index: int, instance: int, role: Role, limits: Limits, prefill_first: bool = False
    ) -> None:
        mixed, num_stages = role is Role.MIXED, limits.num_stages
        self.unit = Unit(index, instance, Account(limits.num_blocks), mixed, num_stages)
        self.scheduler = PrefillFirst(limits) if prefill_first else BulkScheduler(limits)
        self.held: dict[int, Tokens] = {}  # of requests that may still get tokens here
        self.link_free_s = 0.0
        self._num_received = 0

    def load(self) -> Load:
        return Load._make([*self.scheduler.load(), self._num_received])

    def submit(self, sequence: Tokens) -> None:
        """A prompt arrived."""
        self._num_received += 1
        self.held[sequence.request_id] = sequence
        self.scheduler.submit(sequence)

    def begin_pull(self, sequence: Tokens) -> bool:
        """A pull arrived; False: no room for its pages."""
        self._num_received += 1
        if not self.scheduler.begin_pull(sequence):
            return False
        self.held[sequence.request_id] = sequence
        return True

    def num_tokens(self, request_id: int) -> int:
        """Of a request that decodes here: its prompt and what passes that ended gave it."""
        return self.scheduler.num_tokens(self.held[request_id])

    def link_for(self, now_s: float, seconds: float) -> float:
        """Copy pages for so long, one request after the other; when they are here."""
        self.link_free_s = max(now_s, self.link_free_s) + seconds
        return self.link_free_s

    def finish(self, batch: Batch | None) -> RankDone:
        """Commit a pass that is over; None: the rank took part idle."""
        if batch is None:
            return RankDone(self.load(), [], [], [], [])
        held = self.held
        preempted = [(gone, len(held.pop(gone).token_ids)) for gone in batch.preempted]
        outcome = self.scheduler.commit(batch, [0] * len(batch.sampled))
        prefilled, finished = [], []
        if any(outcome.finish):
            finished = [
                request_id
                for request_id, finish in zip(outcome.request_ids, outcome.finish, strict=True)
                if finish
            ]
            for request_id in finished:
                del held[request_id]
        for sequence, _, _, samples, _ in chunks_of(batch):
            if samples and sequence.request_id in held:
                prefilled.append(sequence.request_id)
        for request_id, _ in outcome.kv_ready:
            del held[request_id]
        return RankDone(self.load(), batch.started, prefilled, finished, preempted)


class Instance:
    """Ranks in lockstep, or one with stages."""

    def __init__(
        self,
        index: int,
        role: Role,
        ranks: Sequence[Rank],
        profile: Profile,
        engine: Engine,
        noise: float,
        seed: int,
    ) -> None:
        self.index = index
        self.role = role
        self.prefills = role is not Role.DECODE
        self.decodes = role is not Role.PREFILL
        self.ranks = list(ranks)
        self.alive = True
        self.lost = False  # declared dead
        self.last: Pass | None = None  # that ended
        self.profile = profile
        self.num_stages = profile.num_stages
        self._pipeline = Pipeline(profile.num_stages)
        self._looks_s = -math.inf  # when it will look again whether the first stage is free
        self._engine = engine
        self._noise = noise
        self._seed = seed
        self._factors = _factors(noise, seed, index)
        self._flights: deque[Flight] = deque()  # they end in this order
        self.is_quiet = False  # of the newest: it has decodes alone, and ends nobody
        self._num_passes = 0
        self._ends_s = 0.0  # of the newest
        self._delays = bool(engine.delay_passes)
        self._flush_s: float | None = None  # when a delayed pass starts at the latest
        self.door_s = 0.0  # how long the next pass waits at most for who may board it
        self._door_until_s = -math.inf

    @property
    def units(self) -> list[Unit]:
        """Its ranks, as dispatch knows them."""
        return [rank.unit for rank in self.ranks]

    def begin(self, now_s: float) -> tuple[float, bool] | None:
        """Start a pass if one can start: when it ends, and True; or when to look again, and False;
        None: nothing to do, or as many passes run as can."""
        flights = self._flights
        if len(flights) == self.num_stages or not self.alive:
            return None
        if self._delays and (flush_s := self._delayed_until(now_s)) > now_s:
            return flush_s, False
        if now_s < self._door_until_s:
            return self._door_until_s, False
        if now_s < self._pipeline.opens_s:
            return self.look_again()
        batches = self._next_batches()
        if not any(batches):
            return None
        works = tuple([work_of(batch) if batch else IDLE for batch in batches])
        self.is_quiet = all([isinstance(one, BulkBatch) and one.is_quiet for one in batches])
        self._num_passes = step = self._num_passes + 1
        alone_s = self.profile.cost.pass_s(works) * self._factor(step)
        before_s, ends_s = self._ends_s, self._pipeline.run(now_s, alone_s)
        began_s = max(now_s, before_s) if flights else now_s
        gap_s = began_s - before_s if step > 1 else 0.0
        record = Pass(self.index, began_s, ends_s - began_s, gap_s, works)
        flights.append(Flight(record, step, batches, ends_s))
        self._ends_s = ends_s
        self._flush_s = None
        return ends_s, True

    def end(self) -> InstanceDone:
        """The oldest pass is over."""
        self.last, step, batches, ends_s = self._flights.popleft()
        ranks = [rank.finish(batch) for rank, batch in zip(self.ranks, batches, strict=True)]
        if self.door_s and any(rank.scheduler.load()[1] for rank in self.ranks):
            self._door_until_s = ends_s + self.door_s
        return InstanceDone(self.last, step, ranks)

    def end_quietly(self) -> QuietDone:
        """The oldest pass is over, a quiet one."""
        self.last, step, batches, _ = self._flights.popleft()
        loads = []
        for rank, batch in zip(self.ranks, batches, strict=True):
            rank.scheduler.commit_quietly(batch)
            loads.append(rank.load())
        return QuietDone(self.last, step, loads)

    def _next_batches(self) -> list[Batch | None]:
        """Of each rank, beside those that it has under way."""
        flights = self._flights
        if not flights:
            return [rank.scheduler.next_batch() for rank in self.ranks]
        return [
            rank.scheduler.next_batch(any(one.batches[place] for one in flights))
            for place, rank in enumerate(self.ranks)
        ]

    def look_again(self) -> tuple[float, bool] | None:
        """When the first stage is free for what there is to do, unless it was said already."""
        opens_s = self._pipeline.opens_s
        if self._looks_s >= opens_s or len(self._flights) == self.num_stages:
            return None
        if not any(rank.scheduler.has_idle_work for rank in self.ranks):
            return None
        self._looks_s = opens_s
        return opens_s, False

    def _factor(self, number: int) -> float:
        """Of the time of a pass, by its number from 1 on."""
        factors = self._factors
        while len(factors) < number:
            factors.append(pass_factor(self._noise, self._seed, self.index, len(factors) + 1))
        return factors[number - 1]

    def close_door(self) -> None:
        """Who may board is here."""
        self._door_until_s = -math.inf

    def _delayed_until(self, now_s: float) -> float:
        """An engine that holds a prefill pass back while only some of its ranks have work."""
        loads = [rank.scheduler.load() for rank in self.ranks]
        num_prefilling = sum(waiting > 0 for _, waiting, *_ in loads)
        decodes = any(running for running, *_ in loads)
        if decodes or num_prefilling in (0, len(loads)):
            self._flush_s = None
            return -math.inf
        if self._flush_s is None:
            self._flush_s = now_s + self._engine.delay_passes * self._engine.delay_tick_s
        return self._flush_s


def build_instances(scenario: Scenario) -> list[Instance]:
    """The layout's instances, in its order; ranks are numbered through."""
    instances: list[Instance] = []
    num_ranks = 0
    engine = scenario.engine
    for index, (role, shape, profile) in enumerate(scenario.instances):
        limits = Limits(
            profile.num_kv_tokens // scenario.block_size,
            scenario.block_size,
            profile.max_model_len,
            scenario.dispatch.max_num_seqs,
            scenario.dispatch.budget,
            num_stages=profile.num_stages,
            attention_weight=profile.attention_weight,
        )
        noise = profile.noise if scenario.noise is None else scenario.noise
        prefill_first = engine.prefill_first and role is Role.MIXED
        first, num_ranks = num_ranks, num_ranks + shape.ep
        ranks = [Rank(at, index, role, limits, prefill_first) for at in range(first, num_ranks)]
        instance = Instance(index, role, ranks, profile, engine, noise, scenario.seed)
        if scenario.dispatch.holds_door and role is Role.PREFILL and profile.num_stages == 1:
            instance.door_s = 4 * scenario.message_s + 0.001
        instances.append(instance)
    return instances


def smallest_limits(instances: Iterable[Instance]) -> Limits:
    """What binds whoever may come to any of these."""
    limits = [rank.scheduler.limits for instance in instances for rank in instance.ranks]
    return min(limits, key=lambda one: one.num_blocks)
