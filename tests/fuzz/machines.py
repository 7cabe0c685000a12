"""Histories of a node that hypothesis makes up, and shrinks when they break a promise.

The coordinator, its policies and the incoming half of every connection are real; workers and
transports are in memory (tests/fakes). `LifeMachine` is about requests: any mixture of submits,
aborts, clients that leave, workers that are lost and come back, and steps, under any policy.
`WireMachine` adds bytes: frames cut anywhere, frames that are none, readers that stop.

At the end every request that a client sent while it was there has ended exactly once, with the
right tokens or a typed error, and nobody holds a block.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nodeserve.errors import ERRORS
from nodeserve.policy.units import ADMISSIONS, DECODE_ALLOCATIONS
from nodeserve.types import Role
from nodeserve.wire.frames import HEADER, frame
from nodeserve.wire.messages import TO_SERVER, Abort, GetStats, Submit, pack_ids
from tests.fakes.connected import LIMITS, MAX_FRAME_BYTES, ConnectedClient
from tests.fakes.node import VOCAB, FakeNode, expected_stream, policies

LAYOUTS = ["m", "mm", "pd", "ppd", "pdd", "ppdd", "pdm"]
ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}
MAX_CLIENTS = 3
BACKLOG_BYTES = 2048
SMALL = replace(LIMITS, max_backlog_bytes=BACKLOG_BYTES)
WRONG: list[dict[str, Any]] = [
    {"max_tokens": 0},
    {"max_tokens": "5"},
    {"temperature": -1.0},
    {"unknown": 1},
    {"logit_bias": {VOCAB: 1.0}},
    {"stop_token_ids": [[1]]},
    {"seed": 2**63},
]
GARBAGE = [
    frame(b""),
    frame(b"\xc1"),
    frame(b"\x90"),
    frame(b"\x91" * 600),
    frame(b"\x92\x01\xa1x"),
    frame(b"\x95\x00" + b"\xc0" * 4),
    HEADER.pack(MAX_FRAME_BYTES + 1),
    HEADER.pack(2**32 - 1),
]


@dataclass(eq=False)
class Person:
    """A client and what it is owed."""

    client: ConnectedClient
    sent: dict[int, Submit] = field(default_factory=dict)
    aborted: set[int] = field(default_factory=set)
    paused: bool = False
    unsent: bytes = b""  # the rest of a frame that was cut

    @property
    def open(self) -> bool:
        return not self.client.transport.closed


class NodeMachine(RuleBasedStateMachine):
    """What both have."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.people: list[Person] = []
        self.gone: list[Person] = []
        self.random = random.Random(0)
        self.next_id = 0

    def inside(self, action: Callable[[], Any]) -> Any:
        """In the loop, and then as long as the loop has something to do at once."""

        async def go() -> Any:
            result = action()
            for person in self.people:
                while person.open and not person.client.transport.reads:  # noqa: ASYNC110  # a turn
                    await asyncio.sleep(0)
            return result

        return self.loop.run_until_complete(go())

    @initialize(
        layout=st.sampled_from(LAYOUTS),
        num_blocks=st.integers(18, 40),
        max_num_seqs=st.integers(1, 8),
        admission=st.sampled_from(ADMISSIONS),
        decode_allocation=st.sampled_from(DECODE_ALLOCATIONS),
        on_overload=st.sampled_from(["reject", "queue"]),
        max_queued=st.sampled_from([3, 4096]),
        seed=st.integers(0, 2**32),
    )
    def start(self, layout: str, num_blocks: int, seed: int, **settings: Any) -> None:
        self.random = random.Random(seed)
        chosen = policies(
            settings["max_num_seqs"],
            admission=settings["admission"],
            decode_allocation=settings["decode_allocation"],
            on_overload=settings["on_overload"],
            max_num_queued_reqs=settings["max_queued"],
        )
        roles = [ROLES[letter] for letter in layout]
        self.node = self.inside(lambda: FakeNode(roles, num_blocks, chosen))
        self.connect()

    # ---- clients

    @rule()
    @precondition(lambda self: len(self.people) < MAX_CLIENTS)
    def one_more(self) -> None:
        self.connect()

    def connect(self) -> None:
        self.people.append(Person(self.inside(lambda: ConnectedClient(self.node, SMALL))))

    def someone(self, which: int) -> Person | None:
        """One who is connected and has no half of a frame on its way."""
        able = [one for one in self.people if one.open and not one.unsent]
        return able[which % len(able)] if able else None

    @rule(
        which=st.integers(0, 9),
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=120),
        max_tokens=st.integers(1, 60),
        priority=st.integers(-1, 1),
        slo=st.sampled_from([None, None, {"ttft_ms": 5.0}, {"ttft_ms": 1e6, "tpot_ms": 1.0}]),
    )
    def submit(self, which: int, prompt: list[int], slo: Any, **how: int) -> None:
        if person := self.someone(which):
            sampling = {"max_tokens": how["max_tokens"], "temperature": 0.0}
            self.send(
                person, Submit(self.next_id, pack_ids(prompt), sampling, slo, how["priority"])
            )

    @rule(which=st.integers(0, 9), num=st.integers(2, 12), seed=st.integers(0, 2**32))
    def submit_many(self, which: int, num: int, seed: int) -> None:
        """Enough to fill the pools: prompts of several blocks."""
        chance = random.Random(seed)
        for _ in range(num):
            if person := self.someone(which):
                prompt = [chance.randrange(VOCAB) for _ in range(chance.randint(1, 120))]
                sampling = {"max_tokens": chance.randint(1, 60), "temperature": 0.0}
                self.send(person, Submit(self.next_id, pack_ids(prompt), sampling, None, 0))

    def send(self, person: Person, submit: Submit) -> None:
        self.next_id += 1
        person.sent[submit.request_id] = submit
        self.inside(lambda: person.client.send(submit))

    @rule(which=st.integers(0, 9), wrong=st.sampled_from(WRONG))
    def submit_wrongly(self, which: int, wrong: dict[str, Any]) -> None:
        if person := self.someone(which):
            self.send(person, Submit(self.next_id, pack_ids([1]), wrong, None, 0))

    @rule(which=st.integers(0, 9), back=st.integers(0, 5))
    def abort(self, which: int, back: int) -> None:
        """Its own, somebody else's, one that has ended or one that never was."""
        request_id = self.next_id - back
        if person := self.someone(which):
            person.aborted.add(request_id)
            self.inside(lambda: person.client.send(Abort(request_id)))

    @rule(which=st.integers(0, 9))
    def leave(self, which: int) -> None:
        if self.people:
            self.part(self.people[which % len(self.people)])

    @rule()
    def notice(self) -> None:
        """The loop tells of connections that the server closed."""
        for person in [one for one in self.people if not one.open]:
            self.part(person)

    def part(self, person: Person) -> None:
        self.people.remove(person)
        self.gone.append(person)
        self.inside(person.client.leave)

    # ---- the node

    @rule(num=st.integers(1, 200))
    def go_on(self, num: int) -> None:
        for _ in range(num):
            self.inside(self.act)

    def act(self) -> None:
        if any(not one.lost for one in self.node.workers):
            self.node.act(self.random)
        else:
            self.node.now += 0.001
            self.node.turn()

    @rule(which=st.integers(0, 9))
    def lose_a_worker(self, which: int) -> None:
        """The last one of its role, or of all, as well: whoever is left stands in."""
        if alive := [one for one in self.node.workers if not one.lost]:
            self.inside(lambda: self.node.lose(alive[which % len(alive)]))

    @rule(which=st.integers(0, 9))
    def start_again(self, which: int) -> None:
        if lost := [one for one in self.node.workers if one.lost]:
            self.inside(lambda: self.node.restart(lost[which % len(lost)].link.instance))

    @invariant()
    def pools_add_up(self) -> None:
        for worker in getattr(self, "node", FakeNode([])).workers:
            assert 0 <= worker.free <= worker.num_blocks

    # ---- the end

    def teardown(self) -> None:
        try:
            if hasattr(self, "node"):
                self.inside(self.finish)
        finally:
            for person in self.people:
                person.client.ours.close()
                person.client.theirs.close()
            self.loop.close()

    def finish(self) -> None:
        for person in self.people:
            if person.paused and person.open:
                person.client.connection.resume_writing()
        for worker in [one for one in self.node.workers if one.lost]:
            self.node.restart(worker.link.instance)
        self.node.run_to_idle(self.random)
        for person in self.people:
            if person.open:
                self.check(person)
        for person in self.people:
            person.client.leave()
        self.node.run_to_idle(self.random)
        self.node.check_nothing_held()
        assert not self.node.coordinator.streams and not self.node.coordinator.requests
        for person in self.gone + self.people:
            assert all(len(ends) == 1 for ends in person.client.transport.ends.values())

    def check(self, person: Person) -> None:
        transport = person.client.transport
        assert transport.ends.keys() == person.sent.keys()
        for request_id, submit in person.sent.items():
            (end,) = transport.ends[request_id]
            got = transport.tokens.get(request_id, [])
            wrong = submit.sampling in WRONG
            assert (end.code == "invalid_request") == wrong
            if end.reason == "length":
                assert len(got) == submit.sampling["max_tokens"] and end.code is None
            else:
                assert end.code in ERRORS
                assert end.code != "cancelled" or request_id in person.aborted
            prompt = list(memoryview(submit.token_ids).cast("i"))
            assert got == expected_stream(prompt, len(got))


class LifeMachine(NodeMachine):
    """Requests, under every policy."""


class WireMachine(NodeMachine):
    """Bytes."""

    @rule(which=st.integers(0, 9), cuts=st.lists(st.integers(1, 40), max_size=4))
    def submit_in_pieces(self, which: int, cuts: list[int]) -> None:
        """The rest of the last piece comes later, or never."""
        if (person := self.someone(which)) is None:
            return
        submit = Submit(self.next_id, pack_ids([5, 6, 7]), {"max_tokens": 9}, None, 0)
        submit.sampling["temperature"] = 0.0
        self.next_id += 1
        person.unsent = frame(TO_SERVER.encode(submit))
        person.sent[submit.request_id] = submit
        for cut in cuts:
            self.send_some(person, cut)

    @rule(which=st.integers(0, 9), size=st.integers(1, 100))
    def send_more(self, which: int, size: int) -> None:
        cut = [one for one in self.people if one.unsent and one.open]
        if cut:
            self.send_some(cut[which % len(cut)], size)

    def send_some(self, person: Person, size: int) -> None:
        part, person.unsent = person.unsent[:size], person.unsent[size:]
        if part:
            self.inside(lambda: person.client.feed(part))

    @rule(which=st.integers(0, 9), bad=st.sampled_from(GARBAGE) | st.binary(max_size=40).map(frame))
    def send_garbage(self, which: int, bad: bytes) -> None:
        """No message: this connection ends with a reason, and its requests with it."""
        if (person := self.someone(which)) is None:
            return
        if bad[HEADER.size :] in (b"\x91\x02",):  # it is one
            return
        self.inside(lambda: person.client.feed(bad))
        if person.client.connection.stream.closed:
            assert person.paused or len(person.client.transport.goodbyes) == 1
            assert not person.client.connection.stream.requests

    @rule(which=st.integers(0, 9), num=st.sampled_from([1, 5, 600]))
    def ask(self, which: int, num: int) -> None:
        person = self.someone(which)
        if person is None:
            return
        before = len(person.client.transport.stats)
        self.inside(lambda: person.client.send(*[GetStats()] * num))
        answered = len(person.client.transport.stats) - before
        assert answered == num or person.paused or not person.open

    @rule(which=st.integers(0, 9))
    def stop_reading(self, which: int) -> None:
        person = self.someone(which)
        if person is not None and not person.paused:
            person.paused = True
            self.inside(person.client.connection.pause_writing)

    @rule(which=st.integers(0, 9))
    def read_on(self, which: int) -> None:
        person = self.someone(which)
        if person is not None and person.paused:
            person.paused = False
            self.inside(person.client.connection.resume_writing)

    @invariant()
    def backlogs_are_bounded(self) -> None:
        for person in self.people:
            stream = person.client.connection.stream
            assert stream._held_bytes <= BACKLOG_BYTES or stream.closed

    def finish(self) -> None:
        """What was cut and never completed was never sent."""
        for person in self.people:
            if person.unsent:
                person.sent.popitem()
        super().finish()


MACHINES: dict[str, type[NodeMachine]] = {"life": LifeMachine, "wire": WireMachine}
