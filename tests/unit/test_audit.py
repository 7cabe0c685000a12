"""The audit: nothing ever differs in a node that works, and whatever differs is named."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from nodeserve.coordinator.audit import Asked, Auditor, own_problems, shown, worker_problems
from nodeserve.policy.lifecycle import Phase
from nodeserve.types import Role
from nodeserve.wire.messages import Counted
from nodeserve.wire.numbers import pack_request_ids
from tests.fakes.node import FakeNode, policies
from tests.repeats import seeds

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
LAYOUTS = {"1m": [M], "1p1d": [P, D], "2p1d": [P, P, D], "1p1d1m": [P, D, M]}


class Audited:
    """A node, and what audits of it found so far."""

    def __init__(self, node: FakeNode) -> None:
        self.node = node
        self.auditor = Auditor(node.coordinator)
        self.results: list[dict[str, Any]] = []

    def ask(self) -> None:
        self.auditor.ask(self.results.append)

    def finish(self) -> dict[str, Any]:
        """One more audit, with nothing but its records moving."""
        count = len(self.results)
        self.ask()
        while len(self.results) == count:
            for worker in self.node.workers:
                worker.receive(random.Random(0))
                self.node.deliver(worker)
        return self.results[-1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", seeds(3, 8))
async def test_it_adds_up_at_any_moment(layout: str, seed: int) -> None:
    """Cancels, disconnects, refusals and preemptions anywhere, and audits in the middle of it."""
    rng = random.Random(seed)
    node = FakeNode(LAYOUTS[layout], num_blocks=20, policies=policies(max_num_seqs=5))
    audited = Audited(node)
    clients = [node.connect()[0] for _ in range(3)]
    for request_id in range(40):
        stream = rng.choice(clients[:2]) if request_id > 20 else rng.choice(clients)
        prompt = [rng.randrange(97) for _ in range(rng.randint(1, 100))]
        node.submit(stream, request_id, prompt, rng.randint(1, 60))
        for _ in range(rng.randint(0, 60)):
            node.act(rng)
            if rng.random() < 0.05:
                audited.ask()
        if rng.random() < 0.2 and (running := list(stream.requests.values())):
            node.coordinator.abort(rng.choice(running))
        if request_id == 20:
            node.coordinator.leave(clients[2])
    node.run_to_idle(rng)
    last = audited.finish()
    assert len(audited.results) > 20
    assert [result["problems"] for result in audited.results if result["problems"]] == []
    assert sum(len(result["requests"]) for result in audited.results) > 20, "some while it ran"
    assert last["requests"] == {} and len(last["workers"]) == len(node.workers)


async def parked() -> tuple[FakeNode, Counted]:
    """A node at rest whose prefill worker has request 1 pinned; what that worker counts."""
    node, rng = FakeNode([P, D], num_blocks=64), random.Random(0)
    stream, _ = node.connect()
    node.submit(stream, 7, [5] * 40, 20)
    (request,) = node.coordinator.requests.values()
    while request.phase is not Phase.PARKED:
        node.turn()
        worker = node.workers[0]
        worker.receive(rng)
        node.step(worker, rng)
        node.deliver(worker)
        node.now += 0.001
    return node, node.workers[0].counted(1)


def problems(node: FakeNode, told: Counted) -> list[str]:
    link = node.workers[0].link
    asked = Asked(link.num_sent, link.account.num_sent)
    told = told._replace(num_records_received=told.num_records_received + 1)  # the Count itself
    asked = replace(asked, num_records=asked.num_records + 1)
    link.num_received += 1
    found = [*worker_problems(link, asked, told, node.coordinator.requests)]
    return found + [*own_problems(node.coordinator)]


NONE, ONE, TWO = pack_request_ids([]), pack_request_ids([1]), pack_request_ids([1, 2])
WRONG: dict[str, tuple[Callable[[Counted], Counted], list[str]]] = {
    "nothing": (lambda told: told, []),
    "a leaked block": (
        lambda told: told._replace(num_free=told.num_free - 1, load=[0, 0, 1, 60, 0, 1]),
        [
            "but 60 are free and 3 belong to requests",
            "free blocks: 61 believed, 60 there",
        ],
    ),
    "a lost record": (
        lambda told: told._replace(num_records_received=told.num_records_received - 1),
        ["records to it: 2 sent, 1 received"],
    ),
    "a record lost on its way back": (
        lambda told: told._replace(num_records_sent=told.num_records_sent + 1),
        ["records from it: 3 sent, 2 received"],
    ),
    "a request lost on its way": (
        lambda told: told._replace(load=[*told.load[:5], 0]),
        ["requests given to it: 1 sent, 0 received"],
    ),
    "a forgotten request": (
        lambda told: told._replace(pinned=NONE),
        ["has nothing of request 1", "requests: 1 believed, 0 there"],
    ),
    "a request too many": (
        lambda told: told._replace(pinned=TWO),
        ["still has request 2", "requests: 1 believed, 2 there"],
    ),
    "a request in another stage": (
        lambda told: told._replace(pinned=NONE, running=ONE),
        ["request 1 is running, not pinned"],
    ),
    "books of its own that do not balance": (
        lambda told: told._replace(problem="check: a block twice"),
        ["its own books: check: a block twice"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
async def test_what_differs_on_a_worker_is_named(name: str) -> None:
    change, words = WRONG[name]
    node, told = await parked()
    found = problems(node, change(told))
    assert len(found) == len(words), found
    for sentence, part in zip(found, words, strict=True):
        assert part in sentence and sentence.startswith("worker 0 (prefill): ")


async def test_what_was_sent_after_the_question_is_left_out() -> None:
    node, told = await parked()
    link = node.workers[0].link
    link.tail = [1, 2]
    assert problems(node, told._replace(pinned=NONE)) == []


def lose_request(node: FakeNode) -> None:
    node.coordinator.requests.clear()


def lose_stream(node: FakeNode) -> None:
    (request,) = node.coordinator.requests.values()
    del request.stream.requests[request.client_id]  # type: ignore[attr-defined]


def unpark(node: FakeNode) -> None:
    node.coordinator.dispatch.parked.remove(1)


def count_twice(node: FakeNode) -> None:
    node.coordinator.totals.count("stop", 0.0)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lose_request, ["still has request 1", "parked", "accepted: 1, but 0", "connections: 1"]),
        (lose_stream, ["open requests of connections: 0, but 1"]),
        (unpark, ["parked requests: 0, but 1"]),
        (count_twice, ["accepted: 1, but 2"]),
    ],
)
async def test_what_differs_in_the_coordinators_books_is_named(
    spoil: Callable[[FakeNode], None], words: list[str]
) -> None:
    node, told = await parked()
    spoil(node)
    found = problems(node, told)
    assert len(found) == len(words), found
    assert all(part in sentence for sentence, part in zip(found, words, strict=True))


async def test_who_asks_during_an_audit_gets_the_next() -> None:
    node = FakeNode([M])
    audited = Audited(node)
    audited.ask()
    audited.ask()
    audited.ask()
    worker = node.workers[0]
    counts = []
    while len(audited.results) < 3:
        worker.receive(random.Random(0))
        node.deliver(worker)
        counts.append(len(audited.results))
    assert counts == [1, 3]


async def test_a_worker_that_does_not_answer_is_named_unless_it_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("audit", "survey"):
        monkeypatch.setattr(f"nodeserve.coordinator.{module}.ANSWER_TIMEOUT_S", 0.0)
    node = FakeNode([M, M])
    auditor = Auditor(node.coordinator)
    results: list[dict[str, Any]] = []
    for lost in (False, True):
        if lost:
            node.lose(node.workers[1])
        done: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        auditor.ask(done.set_result)
        node.workers[0].receive(random.Random(0))
        node.deliver(node.workers[0])
        results.append(await done)
    first, second = results
    assert first["problems"] == ["worker 1 (mixed) did not answer in 0 s"]
    assert second["problems"] == [] and len(second["workers"]) == 1


def test_many_requests_are_not_all_listed() -> None:
    assert shown([3]) == "request 3"
    assert shown([3, 1]) == "requests 1, 3"
    assert shown(range(9)) == "requests 0, 1, 2, 3, 4 and 4 more"
