"""A whole node in memory: the real coordinator, workers that are plain objects.

Each worker has two queues instead of rings and does one thing at a time when told to, so a test can
interleave everything in any order. Tokens depend on all tokens before them: a lost, repeated or
swapped one shows.
"""

import random
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nodeserve.config import EngineConfig
from nodeserve.coordinator.admission import Limits
from nodeserve.coordinator.coordinator import Coordinator
from nodeserve.coordinator.link import WorkerLink
from nodeserve.coordinator.policies import Policies, policies_of
from nodeserve.coordinator.streams import Stream
from nodeserve.policy.blocks import blocks_for
from nodeserve.types import Role
from nodeserve.wire.messages import (
    TO_WORKER,
    Alive,
    Cancel,
    Count,
    Counted,
    Dropped,
    FromWorker,
    KvPulled,
    KvReady,
    KvRefused,
    Prefill,
    Probe,
    Prompt,
    PullKv,
    Ready,
    ReleaseKv,
    StepDone,
    Submit,
    ToWorker,
    pack_ids,
    pack_request_ids,
    pack_times,
    unpack_ids,
)
from tests.fakes.channel import FakeChannel
from tests.fakes.transport import FakeTransport

VOCAB = 97
BLOCK = 16
STEP_S = 0.0005  # half of what each action takes


def next_token(tokens: "array[int] | list[int]") -> int:
    return sum(place * token for place, token in enumerate(tokens, 1)) % VOCAB


def expected_stream(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@dataclass
class Held:
    tokens: "array[int]"
    prompt: int
    limit: int
    state: str  # waiting, running, copying (to where peers can read), pinned
    handoff: bool
    received_s: float
    blocks: int = 0


@dataclass
class FakeWorker:
    """Does what a worker does, one action at a time, in the order of its inbox."""

    link: WorkerLink
    num_blocks: int
    now: Callable[[], float]
    held: dict[int, Held] = field(default_factory=dict)
    out: deque[FromWorker] = field(default_factory=deque)
    lost: bool = False
    num_received: int = 0
    num_records: int = 0

    @property
    def free(self) -> int:
        return self.num_blocks - sum(held.blocks for held in self.held.values())

    def load(self) -> list[int]:
        states = [held.state for held in self.held.values()]
        waiting = sum(len(h.tokens) for h in self.held.values() if h.state == "waiting")
        running, waiting_now, copying, pinned = map(
            states.count, ("running", "waiting", "copying", "pinned")
        )
        wanted = sum(
            blocks_for(len(h.tokens) + 1, BLOCK) - h.blocks
            for h in self.held.values()
            if h.state == "waiting"
        )
        free = self.free - wanted
        return [running, waiting_now, copying + pinned, free, waiting, self.num_received]

    def receive(self, rng: random.Random) -> None:
        channel = self.link.channel
        assert isinstance(channel, FakeChannel)
        if channel.records:
            self.num_records += 1
            self.on(TO_WORKER.decode(channel.records.popleft()), rng)

    def on(self, message: ToWorker, rng: random.Random) -> None:
        match message:
            case Prefill():
                for prompt in (Prompt(*fields) for fields in message.prompts):
                    self.num_received += 1
                    limit = prompt.num_prompt_tokens + int(prompt.sampling["max_tokens"])
                    self.held[prompt.request_id] = Held(
                        unpack_ids(prompt.token_ids),
                        *(prompt.num_prompt_tokens, limit, "waiting", prompt.handoff, self.now()),
                    )
            case PullKv():
                self._pull(message, rng)
            case ReleaseKv():
                assert self.held.pop(message.request_id).state == "pinned"
                self.out.append(Dropped(message.request_id, self.load()))
            case Cancel():
                self.held.pop(message.request_id, None)
                self.out.append(Dropped(message.request_id, self.load()))
            case Probe():
                self.out.append(Alive(self.load()))
            case Count():
                self.out.append(self.counted(message.number))

    def counted(self, number: int) -> Counted:
        ids: dict[str, list[int]] = {}
        for request_id, held in self.held.items():
            ids.setdefault(held.state, []).append(request_id)
        pinned = [*ids.get("pinned", ()), *ids.get("copying", ())]
        return Counted(
            *(number, self.num_records, self.link.num_received + len(self.out) + 1),
            *(self.num_blocks, self.free, self.num_blocks - self.free),
            *(pack_request_ids(ids.get("waiting", ())), pack_request_ids(ids.get("running", ()))),
            b"",
            pack_request_ids(pinned),
            b"",
            self.load(),
            "",
        )

    def _pull(self, message: PullKv, rng: random.Random) -> None:
        self.num_received += 1
        tokens = unpack_ids(message.token_ids)
        need = blocks_for(len(tokens), BLOCK)
        busy = any(held.state == "running" for held in self.held.values())
        if need > self.free or (busy and rng.random() < 0.1):
            self.out.append(KvRefused(message.request_id, self.load()))
            return
        limit = message.num_prompt_tokens + int(message.sampling["max_tokens"])
        prompt = message.num_prompt_tokens
        held = Held(tokens, prompt, limit, "running", False, self.now(), need)
        self.held[message.request_id] = held
        self.out.append(KvPulled(message.request_id, need * 100, 0.001))

    def step(self, rng: random.Random, number: int, in_lockstep: bool = False) -> None:
        """Whatever chance gives a place in it; in lockstep an idle rank reports as well."""
        told = Told()
        for request_id, held in list(self.held.items()):
            if held.state == "pinned" or rng.random() < 0.3:
                continue
            if held.state == "copying":
                held.state = "pinned"
                self.out.append(KvReady(request_id, pack_ids([1])))
                continue
            grown = blocks_for(len(held.tokens) + 1, BLOCK) - held.blocks
            if grown > self.free:
                if held.state == "running":
                    told.preempted.append(request_id)
                    del self.held[request_id]
                continue
            told.count(request_id, held)
            held.blocks += grown
            held.tokens.append(next_token(held.tokens))
            done = len(held.tokens) >= held.limit
            told.add(request_id, held.tokens[-1], done)
            if done:
                del self.held[request_id]
                continue
            late = rng.random() < 0.3
            held.state = "running" if not held.handoff else "copying" if late else "pinned"
            if held.state == "pinned":
                told.ready.append([request_id, pack_ids([1])])
        if told.ids or told.preempted or in_lockstep:
            self.out.append(told.message(self.load(), number, self.now()))


@dataclass
class Told:
    """What a step will say."""

    ids: list[int] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)
    finish: list[int] = field(default_factory=list)
    ready: list[list[object]] = field(default_factory=list)
    started: list[int] = field(default_factory=list)
    received: list[float] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    num_prefill_tokens: int = 0
    kv_tokens: int = 0

    def count(self, request_id: int, held: Held) -> None:
        if held.state == "waiting":
            self.started.append(request_id)
            self.received.append(held.received_s)
            self.num_prefill_tokens += len(held.tokens)
        else:
            self.kv_tokens += len(held.tokens)

    def add(self, request_id: int, token: int, done: bool) -> None:
        self.ids.append(request_id)
        self.sampled.append(token)
        self.finish.append(2 if done else 0)

    def message(self, load: list[int], number: int, now_s: float) -> StepDone:
        return StepDone(
            pack_request_ids(self.ids),
            pack_ids(self.sampled),
            bytes(self.finish),
            None,
            self.ready,
            pack_request_ids(self.started),
            pack_request_ids(self.preempted),
            load,
            step=number,
            began_s=now_s - STEP_S,
            step_s=STEP_S,
            num_prefill_tokens=self.num_prefill_tokens,
            attention=self.num_prefill_tokens / 2,
            num_decodes=len(self.ids) - len(self.started),
            kv_tokens=self.kv_tokens,
            received=pack_times(self.received),
        )


def fake_ready(num_blocks: int) -> Ready:
    return Ready(num_blocks, 100, 1, 100 * num_blocks, b"", "fake", "", 0.0)


LIMITS = Limits(vocab_size=VOCAB, max_model_len=256, block_size=BLOCK)


def policies(max_num_seqs: int = 8, **settings: Any) -> Policies:
    """As `nodeserve start` with these settings, and steps of 128 tokens."""
    return policies_of(EngineConfig(**settings), max_num_seqs, 128)


class FakeNode:
    """The coordinator, its fake workers and a clock that a test moves.

    A turn of the coordinator is one of the things that happen, when it asked for one or its time
    has come: a test calls `turn`, or lets `act` choose.
    """

    def __init__(
        self,
        roles: list[Role],
        num_blocks: int = 64,
        policies: Policies | None = None,
        instances: list[int] | None = None,
    ) -> None:
        self.now = 0.0
        self.num_steps = 0
        self.is_woken = False
        self.wake_s: float | None = None
        links = [
            WorkerLink(index, role, FakeChannel(), -1)  # type: ignore[arg-type]
            for index, role in enumerate(roles)
        ]
        for link, instance in zip(links, instances or range(len(roles)), strict=True):
            link.instance = instance
        policies = policies or policies_of(EngineConfig(), 8, 128)
        self.coordinator = Coordinator(links, LIMITS, policies, lambda: self.now, self._on_wake)
        self.workers = [FakeWorker(link, num_blocks, lambda: self.now) for link in links]
        for link in links:
            link.is_ready(fake_ready(num_blocks))

    def _on_wake(self) -> None:
        self.is_woken = True

    def turn(self) -> None:
        """What the loop does after what came, or when the time has come."""
        if self.is_woken or (self.wake_s is not None and self.now >= self.wake_s):
            self.is_woken = False
            self.wake_s = self.coordinator.turn()

    def connect(self, max_backlog_bytes: int = 1 << 20) -> tuple[Stream, FakeTransport]:
        transport = FakeTransport()
        stream = Stream(transport, max_backlog_bytes, clock=lambda: self.now)  # type: ignore[arg-type]
        self.coordinator.streams.add(stream)
        return stream, transport

    def submit(self, stream: Stream, request_id: int, prompt: list[int], max_tokens: int) -> None:
        sampling = {"max_tokens": max_tokens, "temperature": 0.0}
        self.coordinator.submit(stream, Submit(request_id, pack_ids(prompt), sampling, None, 0))

    def deliver(self, worker: FakeWorker) -> None:
        """One record from a worker to the coordinator."""
        if worker.out and not worker.lost:
            worker.link.num_received += 1
            self.coordinator.handle(worker.link, worker.out.popleft())

    def step(self, worker: FakeWorker, rng: random.Random) -> None:
        """A step of its instance: all ranks take part."""
        instance = worker.link.instance
        ranks = [one for one in self.workers if one.link.instance == instance]
        self.num_steps += 1
        for rank in ranks:
            if not rank.lost:
                rank.step(rng, self.num_steps, in_lockstep=len(ranks) > 1)

    def act(self, rng: random.Random) -> None:
        """One random thing happens somewhere."""
        self.now += 0.001
        alive = [worker for worker in self.workers if not worker.lost]
        if not alive:
            return self.turn()
        worker = rng.choice(alive)
        rng.choice(
            [
                lambda: worker.receive(rng),
                lambda: self.step(worker, rng),
                lambda: self.deliver(worker),
                self.turn,
            ]
        )()

    def lose(self, worker: FakeWorker) -> None:
        worker.lost = True
        self.coordinator.lose(worker.link)

    def restart(self, instance: int) -> None:
        """A lost instance comes back: new links, nothing in them."""
        links, ranks = self.coordinator.links, []
        for worker in self.workers:
            old = worker.link
            if old.instance == instance:
                link = WorkerLink(old.index, old.role, FakeChannel(), -1)  # type: ignore[arg-type]
                link.instance = instance
                links[link.index] = link
                link.is_ready(fake_ready(worker.num_blocks))
                fresh = FakeWorker(link, worker.num_blocks, worker.now)
                self.workers[self.workers.index(worker)] = fresh
                ranks.append(link)
        self.coordinator.join(ranks)

    def run_to_idle(self, rng: random.Random, max_actions: int = 200_000) -> None:
        for _ in range(max_actions):
            if not self.coordinator.requests:
                self.turn()
                return
            self.act(rng)
        phases = [request.phase.name for request in self.coordinator.requests.values()]
        raise AssertionError(f"still alive: {phases}")

    def check_nothing_held(self) -> None:
        """After the last request: nobody holds blocks, counts or queue places."""
        dispatch = self.coordinator.dispatch
        assert not dispatch.num_queued and not len(dispatch.parked)
        assert dispatch.suspects.on_trial is None
        for worker in self.workers:
            if worker.lost:
                continue
            while worker.link.channel.records:  # type: ignore[attr-defined]
                worker.receive(random.Random(0))
            while worker.out:
                self.deliver(worker)
            assert not worker.held and worker.free == worker.num_blocks
            assert not worker.link.offered
            account = worker.link.account
            assert (account.outstanding_tokens, account.num_sequences) == (0, 0)
            assert account.free_blocks == worker.num_blocks
