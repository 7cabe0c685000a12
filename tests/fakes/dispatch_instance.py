"""Instances as small as dispatch can see them, in virtual time.

Prompts are computed front to back, a budget a pass; then they decode (mixed instances) or stay
pinned until somebody has pulled them. Whatever a rank says goes to `hear`, some time later.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from nodeserve.plan.clock import Clock
from nodeserve.policy.cost import RankWork
from nodeserve.policy.units import DispatchOptions, PassDone, Unit
from nodeserve.types import Load

DOOR_S = 0.02  # how long a prefill instance with prompts left waits for who may board


@dataclass(frozen=True, slots=True)
class Request:
    """One request, and what becomes of it."""

    arrives_s: float
    num_tokens: int
    num_blocks: int = 1
    priority: int = 0
    best_effort: bool = False
    num_decodes: int = 1  # on a mixed instance; 0: on any it ends with its first token
    pinned_s: float = 0.0  # on others than mixed ones
    cancelled_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class World:
    """What a life is lived in."""

    options: DispatchOptions
    num_instances: int
    decodes: bool  # mixed instances
    lags_s: tuple[float, ...]  # one for each rank of an instance: how much later it is heard
    num_blocks: int
    pass_s: float
    token_s: float
    transit_s: float
    report_loss: float  # share of prefill passes of which no report comes


@dataclass(slots=True, eq=False)
class Job:
    """A request on a worker."""

    request_id: int
    request: Request
    num_computed: int = 0
    num_decoded: int = 0


class Told(NamedTuple):
    """What one rank says; a report that gets lost takes the load with it, not who ended."""

    instance: "Instance"
    rank: "Rank"
    ended: list[int]
    load: Load | None
    done: PassDone | None = None
    is_answer: bool = False


class Rank:
    """A queue and a pool."""

    def __init__(self, unit: Unit, lag_s: float) -> None:
        self.unit = unit
        self.lag_s = lag_s
        self.num_received = 0
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.pinned: list[Job] = []

    def load(self) -> Load:
        held = self.waiting + self.running + self.pinned
        return Load(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_pinned=len(self.pinned),
            num_free_blocks=self.unit.account.num_blocks - sum(j.request.num_blocks for j in held),
            waiting_tokens=sum(j.request.num_tokens - j.num_computed for j in self.waiting),
            num_received=self.num_received,
        )

    def submit(self, job: Job) -> None:
        self.num_received += 1
        self.waiting.append(job)

    def drop(self, request_id: int) -> None:
        for jobs in (self.waiting, self.running, self.pinned):
            jobs[:] = [job for job in jobs if job.request_id != request_id]

    def plan(self, budget: int) -> dict[Job, int]:
        """Prompt tokens of the next pass, beside a decode of everybody who runs."""
        chunks: dict[Job, int] = {}
        room = budget - len(self.running)
        for job in self.waiting:
            num_tokens = min(room, job.request.num_tokens - job.num_computed)
            if num_tokens <= 0:
                break
            chunks[job] = num_tokens
            room -= num_tokens
        return chunks

    def commit(self, chunks: dict[Job, int]) -> tuple[list[int], list[Job]]:
        """The pass is over: who ended, and who is pinned now. Nobody that was cancelled."""
        for job in self.running:
            job.num_decoded += 1
        for job, num_tokens in chunks.items():
            job.num_computed += num_tokens
        complete = [job for job in self.waiting if job.num_computed == job.request.num_tokens]
        ended = [
            job for job in self.running + complete if job.num_decoded >= job.request.num_decodes
        ]
        for job in complete:
            self.waiting.remove(job)
            (self.running if self.unit.decodes else self.pinned).append(job)
        for job in ended:
            self.drop(job.request_id)
        pinned = [job for job in complete if job in self.pinned]
        return [job.request_id for job in ended], pinned


class Instance:
    """Ranks in lockstep, from a start to a death: one that comes back is another Instance."""

    def __init__(
        self,
        world: World,
        units: Sequence[Unit],
        clock: Clock,
        random: Random,
        hear: Callable[[Told], None],
    ) -> None:
        self.world = world
        self.ranks = {
            unit.index: Rank(unit, lag_s) for unit, lag_s in zip(units, world.lags_s, strict=True)
        }
        self.alive = True
        self.lost = False  # and known to be
        self.unanswered: set[int] = set()  # ranks that a probe was sent to
        self._clock, self._random, self._hear = clock, random, hear
        self._step = 0
        self._runs = self._at_door = False

    def take(self, batch: list[tuple[Job, int]]) -> None:
        """A departure arrives, perhaps an empty one."""
        for job, index in batch:
            self.ranks[index].submit(job)
        self._at_door = False
        self._begin()

    def answer(self, _: None) -> None:
        for rank in self.ranks.values():
            self._tell(Told(self, rank, [], rank.load(), is_answer=True))

    def cancel(self, which: tuple[int, int]) -> None:
        request_id, index = which
        rank = self.ranks[index]
        rank.drop(request_id)
        self._tell(Told(self, rank, [], rank.load()))

    def _tell(self, told: Told) -> None:
        if self.alive:
            self._clock.after(self.world.transit_s + told.rank.lag_s, self._hear, told)

    def _begin(self) -> None:
        if not self.alive or self._runs or self._at_door:
            return
        plans = [rank.plan(self.world.options.budget) for rank in self.ranks.values()]
        works = [
            RankWork(
                sum(plan.values()),
                sum(num * (job.num_computed + num / 2) for job, num in plan.items()),
                len(rank.running),
            )
            for rank, plan in zip(self.ranks.values(), plans, strict=True)
        ]
        if any(work.prefill_tokens or work.num_decodes for work in works):
            self._runs, self._step = True, self._step + 1
            longest = max(work.prefill_tokens for work in works)
            seconds = self.world.pass_s + self.world.token_s * longest
            dones = [PassDone(self._step, self._clock.now_s, seconds, work) for work in works]
            self._clock.after(seconds, self._end, (plans, dones))

    def _end(self, run: tuple[list[dict[Job, int]], list[PassDone]]) -> None:
        plans, dones = run
        self._runs = False
        prefilled = any(done.work.prefill_tokens for done in dones)
        is_lost = prefilled and self._random.random() < self.world.report_loss
        for rank, plan, done in zip(self.ranks.values(), plans, dones, strict=True):
            ended, pinned = rank.commit(plan)
            load, word = (None, None) if is_lost else (rank.load(), done)
            self._tell(Told(self, rank, ended, load, word))
            for job in pinned:
                self._clock.after(job.request.pinned_s, self._release, (rank, job))
        left = any(rank.waiting for rank in self.ranks.values())
        if left and self.world.options.holds_door and not self.world.decodes:
            self._at_door = True
            self._clock.after(DOOR_S, self._leave_door, self._step)
        self._begin()

    def _leave_door(self, step: int) -> None:
        if step == self._step:
            self._at_door = False
            self._begin()

    def _release(self, what: tuple[Rank, Job]) -> None:
        rank, job = what
        if job in rank.pinned:
            rank.drop(job.request_id)
            self._tell(Told(self, rank, [job.request_id], rank.load()))
