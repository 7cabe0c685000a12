"""Simulated instances: what workers and devices do, in virtual time.

Each DP rank has the real `Scheduler` over real blocks (decodes in bulk, see bulk.py), so chunks,
preemptions and memory are those of a live worker. The ranks of an instance run their passes
together: all plan when a pass starts, it lasts what the cost model says of the work of all, all
commit when it ends. A rank without work takes part idle. A pass cannot be interrupted; what arrives
meanwhile waits for the next one.

An instance with pipeline stages is simulated as several, one for each stage, which share the stages
and split the memory: its lanes. Each has a batch of its own in flight, so passes of
different lanes overlap, and a sequence never waits for itself.
"""

import math
from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from nodeserve.plan.bulk import BulkBatch, BulkScheduler, PrefillFirst, chunks_of, work_of
from nodeserve.plan.records import Engine, Pass, Scenario
from nodeserve.policy.account import Account
from nodeserve.policy.batching import Batch, Limits
from nodeserve.policy.batching import Sequence as Tokens
from nodeserve.policy.cost import IDLE
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
    """What all ranks of an instance tell of a pass."""

    record: Pass
    step: int
    ranks: list[RankDone]


class QuietDone(NamedTuple):
    """What all ranks tell of a pass in which nobody began or ended."""

    record: Pass
    step: int
    loads: list[Load]


class Pipeline:
    """Stages that passes go through in order, each stage one pass at a time."""

    def __init__(self, num_stages: int = 1) -> None:
        self.num_stages = num_stages
        self._free_s = [-math.inf] * num_stages

    @property
    def opens_s(self) -> float:
        """When the first stage can take the next pass."""
        return self._free_s[0]

    def run(self, now_s: float, seconds: float) -> float:
        """Send a pass through that takes so long alone; when it is out. O(stages)."""
        ends_s = now_s
        for stage, free_s in enumerate(self._free_s):
            ends_s = max(ends_s, free_s) + seconds / self.num_stages
            self._free_s[stage] = ends_s
        return ends_s


class Rank:
    """One worker: its blocks and sequences, and the link over which it pulls pages."""

    def __init__(
        self, index: int, instance: int, role: Role, limits: Limits, prefill_first: bool = False
    ) -> None:
        self.unit = Unit(index, instance, Account(limits.num_blocks), role is Role.MIXED)
        self.scheduler = PrefillFirst(limits) if prefill_first else BulkScheduler(limits)
        self.held: dict[int, Tokens] = {}  # of requests that may still get tokens here
        self.link_free_s = 0.0
        self._num_received = 0

    def load(self) -> Load:
        return Load(*self.scheduler.load(), self._num_received)

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
    """Ranks in lockstep."""

    def __init__(
        self,
        index: int,
        role: Role,
        ranks: Sequence[Rank],
        profile: Profile,
        pipeline: Pipeline,
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
        self.num_passes = 0
        self.last: Pass | None = None
        self.profile = profile
        self.pipeline = pipeline
        self._looks_s = -math.inf  # when it will look again whether the first stage is free
        self._engine = engine
        self._noise = noise
        self._seed = seed
        self._factors = _factors(noise, seed, index)
        self._running: list[Batch | None] | None = None
        self.is_quiet = False  # of the pass that runs: it has decodes alone, and ends nobody
        self._ends_s = 0.0
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
        None: nothing to do, or a pass runs."""
        if self._running is not None or not self.alive:
            return None
        if self._delays and (flush_s := self._delayed_until(now_s)) > now_s:
            return flush_s, False
        if now_s < self._door_until_s:
            return self._door_until_s, False
        if now_s < self.pipeline.opens_s:
            return self._look_again()
        batches = [rank.scheduler.next_batch() for rank in self.ranks]
        if not any(batches):
            return None
        works = tuple([work_of(batch) if batch else IDLE for batch in batches])
        self.is_quiet = all([isinstance(one, BulkBatch) and one.is_quiet for one in batches])
        self.num_passes += 1
        alone_s = self.profile.cost.pass_s(works) * self._factor(self.num_passes)
        gap_s = now_s - self._ends_s if self.last else 0.0
        ends_s = self._ends_s = self.pipeline.run(now_s, alone_s)
        self.last = Pass(self.index, now_s, ends_s - now_s, gap_s, works)
        self._running = batches
        self._flush_s = None
        return ends_s, True

    def end(self) -> InstanceDone:
        """The pass is over."""
        assert self._running is not None
        batches, self._running = self._running, None
        ranks = [rank.finish(batch) for rank, batch in zip(self.ranks, batches, strict=True)]
        if self.door_s and any(rank.scheduler.load()[1] for rank in self.ranks):
            self._door_until_s = self._ends_s + self.door_s
        assert self.last is not None
        return InstanceDone(self.last, self.num_passes, ranks)

    def end_quietly(self) -> QuietDone:
        """A quiet pass is over."""
        batches, self._running = self._running, None
        assert batches is not None and self.last is not None
        loads = []
        for rank, batch in zip(self.ranks, batches, strict=True):
            rank.scheduler.commit_quietly(batch)
            loads.append(rank.load())
        return QuietDone(self.last, self.num_passes, loads)

    def _factor(self, number: int) -> float:
        """Of the time of a pass, by its number from 1 on."""
        factors = self._factors
        while len(factors) < number:
            factors.append(pass_factor(self._noise, self._seed, self.index, len(factors) + 1))
        return factors[number - 1]

    def close_door(self) -> None:
        """Who may board is here."""
        self._door_until_s = -math.inf

    def _look_again(self) -> tuple[float, bool] | None:
        """When the first stage is free, unless it was said already."""
        opens_s = self.pipeline.opens_s
        if self._looks_s >= opens_s or not any(map(_has_work, self.ranks)):
            return None
        self._looks_s = opens_s
        return opens_s, False

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


def _has_work(rank: Rank) -> bool:
    num_running, num_waiting, *_ = rank.scheduler.load()
    return num_running + num_waiting > 0


def build_instances(scenario: Scenario) -> list[Instance]:
    """The lanes of the layout's instances, in its order; ranks are numbered through."""
    instances: list[Instance] = []
    num_ranks = 0
    for role, shape, profile in scenario.instances:
        pipeline = Pipeline(profile.num_stages)
        limits = Limits(
            profile.num_kv_tokens // profile.num_stages // scenario.block_size,
            scenario.block_size,
            profile.max_model_len,
            scenario.dispatch.max_num_seqs,
            scenario.dispatch.budget,
        )
        noise = profile.noise if scenario.noise is None else scenario.noise
        engine = scenario.engine
        prefill_first = engine.prefill_first and role is Role.MIXED
        for _ in range(profile.num_stages):
            index, first = len(instances), num_ranks
            num_ranks += shape.ep
            ranks = [Rank(at, index, role, limits, prefill_first) for at in range(first, num_ranks)]
            instance = Instance(index, role, ranks, profile, pipeline, engine, noise, scenario.seed)
            if scenario.dispatch.holds_door and role is Role.PREFILL:
                instance.door_s = 4 * scenario.message_s + 0.001
            instances.append(instance)
    return instances


def smallest_limits(instances: Iterable[Instance]) -> Limits:
    """What binds whoever may come to any of these."""
    limits = [rank.scheduler.limits for instance in instances for rank in instance.ranks]
    return min(limits, key=lambda one: one.num_blocks)
