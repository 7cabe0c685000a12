"""One request ends every worker that computes it: it fails, and those beside it do not."""

import random

import pytest

from nodeserve.coordinator.request import Request
from nodeserve.policy.lifecycle import Phase
from nodeserve.policy.suspects import MAX_LOSSES, Suspects
from nodeserve.policy.units import Waiting
from nodeserve.types import Role
from tests.fakes.node import FakeNode, FakeWorker, expected_stream
from tests.fakes.transport import FakeTransport

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
LAYOUTS = {"1m": [M], "1p1d": [P, D], "2p2d": [P, P, D, D]}
COUNT, TOKENS = 12, 20


def waiting(request_id: int, priority: int = 0) -> Waiting:
    return Waiting(request_id, 5, 1, 0.0, priority)


def test_the_next_one_goes_on_when_the_last_is_over() -> None:
    suspects = Suspects()
    assert suspects.next() is None
    for request_id in (3, 1, 2):
        suspects.add(waiting(request_id))
    first = suspects.next()
    assert first is not None and first.request_id == 1 and suspects.on_trial == 1
    assert suspects.next() is None and len(suspects) == 2
    suspects.remove(2)  # it ended while it waited
    suspects.remove(9)
    assert suspects.next() is None
    suspects.remove(1)
    third = suspects.next()
    assert third is not None and third.request_id == 3 and not len(suspects)


def test_the_line_goes_by_priority() -> None:
    suspects = Suspects()
    for request_id, priority in ((1, 0), (2, 3), (3, 3)):
        suspects.add(waiting(request_id, priority))
    order = []
    while (one := suspects.next()) is not None:
        order.append(one.request_id)
        suspects.remove(one.request_id)
    assert order == [2, 3, 1]


def test_who_is_put_back_on_trial_begins_it_again() -> None:
    suspects = Suspects()
    for request_id in (1, 2):
        suspects.add(waiting(request_id))
    suspects.next()
    suspects.add(waiting(1))
    assert suspects.on_trial is None and len(suspects) == 2
    again = suspects.next()
    assert again is not None and again.request_id == 1


class Poisoned:
    """A node whose workers end when they hold request `poison` in a state of these, if they are of
    `roles`. They come back at once."""

    def __init__(self, layout: str, states: set[str], after: int = 0) -> None:
        self.node = FakeNode(LAYOUTS[layout])
        self.states = states
        self.after = after  # tokens that it gets before
        self.num_deaths = 0
        self.num_beside = 0  # that others had to suffer, all together
        self.poison: Request | None = None

    def submit(self, number: int) -> FakeTransport:
        """The last one but two is the poison: neither first nor last in any line."""
        stream, client = self.node.connect()
        for request_id in range(number):
            self.node.submit(stream, request_id, [request_id + 1] * 9, TOKENS)
        self.poison = stream.requests[number - 3]
        return client

    def run(self, rng: random.Random) -> None:
        for _ in range(200_000):
            if not self.node.coordinator.requests:
                return
            self.node.act(rng)
            for worker in list(self.node.workers):
                if self._is_hit(worker):
                    self._end(worker)
        raise AssertionError("no end")

    def _is_hit(self, worker: FakeWorker) -> bool:
        assert self.poison is not None
        held = worker.held.get(self.poison.request_id)
        return (
            held is not None
            and held.state in self.states
            and len(held.tokens) >= held.prompt + self.after
        )

    def _end(self, worker: FakeWorker) -> None:
        assert self.poison is not None
        self.num_deaths += 1
        self.num_beside += len(worker.held) - 1
        self.node.lose(worker)
        self.node.restart(worker.link.instance)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("state", ["waiting", "running"])
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_only_the_one_that_ends_workers_ends_for_it(
    layout: str, state: str, seed: int
) -> None:
    """Those beside it in three batches were told that they might be why workers ended."""
    node = Poisoned(layout, {state}, after=0 if state == "waiting" else 2)
    client = node.submit(COUNT)
    assert node.poison is not None
    node.run(random.Random(seed))
    assert node.num_deaths == 3
    for number in range(COUNT):
        (end,) = client.ends[number]
        if number == node.poison.client_id:
            assert end.code == "worker_lost"
            assert end.message == "3 workers ended while they computed this request"
        else:
            assert end.reason == "length"
            assert client.tokens[number] == expected_stream([number + 1] * 9, TOKENS)
    node.node.check_nothing_held()


async def test_suspects_go_on_one_at_a_time_beside_others() -> None:
    """And are among the waiting ones in what is said of the node meanwhile."""
    node, rng = FakeNode([P, D]), random.Random(2)
    stream, client = node.connect()
    for request_id in range(6):
        node.submit(stream, request_id, [request_id] * 9, 60)
    for _ in range(2):
        while len(node.workers[1].held) < 6:
            node.act(rng)
        node.lose(node.workers[1])
        node.restart(1)
    node.submit(stream, 6, [6] * 9, 60)
    suspects = node.coordinator.dispatch.suspects
    assert len(suspects) == 6 and node.coordinator.dispatch.num_queued == 7
    together = 0
    while any(request.is_suspect for request in stream.requests.values()):
        node.act(rng)
        placed = [one for one in stream.requests.values() if one.phase is not Phase.WAITING]
        assert sum(one.is_suspect for one in placed) <= 1
        together = max(together, len(placed))
    assert together == 7, "who is acquitted does not wait for the others"
    node.run_to_idle(rng)
    assert all(client.tokens[one] == expected_stream([one] * 9, 60) for one in range(7))
    node.check_nothing_held()


async def test_a_suspect_that_is_cancelled_makes_way() -> None:
    node, rng = FakeNode([M]), random.Random(0)
    stream, client = node.connect()
    for request_id in range(3):
        node.submit(stream, request_id, [request_id] * 9, 60)
    for _ in range(2):
        while len(node.workers[0].held) < 3:
            node.act(rng)
        node.lose(node.workers[0])
        node.restart(0)
    suspects = node.coordinator.dispatch.suspects
    while suspects.on_trial is None:
        node.act(rng)
    for one in (suspects.on_trial, max(request for request in node.coordinator.requests)):
        node.coordinator.abort(node.coordinator.requests[one])
    node.run_to_idle(rng)
    assert [client.ends[one][0].reason for one in range(3)] == ["cancelled", "length", "cancelled"]
    node.check_nothing_held()


async def test_one_that_passes_every_trial_does_not_end_workers_for_ever() -> None:
    """It ends them some tokens later than it stood: each trial acquits it."""
    node, rng = FakeNode([M]), random.Random(0)
    stream, client = node.connect()
    node.submit(stream, 0, [1, 2], 200)
    (request,) = node.coordinator.requests.values()
    for number in range(MAX_LOSSES + 1):
        assert request.num_losses == number and not client.ends
        while not node.workers[0].held or request.is_suspect:
            node.act(rng)
        node.lose(node.workers[0])
        node.restart(0)
    node.run_to_idle(rng)
    assert [end.code for end in client.ends[0]] == ["worker_lost"]
    node.check_nothing_held()
