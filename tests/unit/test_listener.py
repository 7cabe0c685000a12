"""The incoming half of a connection: bytes in, and nobody else disturbed."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from nodeserve.coordinator.intake import MOST_A_TURN
from nodeserve.coordinator.listener import FRAME_LOOKS
from nodeserve.coordinator.streams import Backlog
from nodeserve.types import Role
from nodeserve.wire.frames import HEADER, frame
from nodeserve.wire.messages import TO_SERVER, Abort, GetStats, Hello, Submit, pack_ids
from tests.fakes.connected import LIMITS, MAX_FRAME_BYTES, ConnectedClient
from tests.fakes.node import FakeNode

SUBMIT = Submit(1, pack_ids([3, 1, 4]), {"max_tokens": 5, "temperature": 0.0}, None, 0)


def fake_node() -> FakeNode:
    return FakeNode([Role.MIXED])


async def test_a_client_is_greeted_and_answered() -> None:
    client = ConnectedClient(fake_node())
    client.send(GetStats(), GetStats())
    assert [type(hello) for hello in client.transport.hellos] == [Hello]
    assert len(client.transport.stats) == 2
    client.leave()


BROKEN = {
    "a frame too large": (HEADER.pack(MAX_FRAME_BYTES + 1), "frame_too_large"),
    "four gigabytes": (b"\xff\xff\xff\xff", "frame_too_large"),
    "no msgpack": (frame(b"\xc1"), "protocol"),
    "an empty frame": (frame(b""), "protocol"),
    "too many containers": (frame(b"\x91" * 1000), "protocol"),
    "another union's message": (frame(b"\x92\x01\x90"), "protocol"),
}


@pytest.mark.parametrize(("data", "code"), BROKEN.values(), ids=BROKEN.keys())
async def test_what_is_no_message_ends_its_connection_alone(data: bytes, code: str) -> None:
    node = fake_node()
    bad, good = ConnectedClient(node), ConnectedClient(node)
    for client in (bad, good):
        client.send(SUBMIT)
    bad.feed(data)
    (goodbye,) = bad.transport.goodbyes
    assert goodbye.code == code and bad.transport.closed
    assert not good.transport.closed
    assert [request.stream for request in node.coordinator.requests.values()] == [
        good.connection.stream
    ]
    bad.feed(frame(b"\xc1"))  # what was under way is not looked at
    bad.leave()
    good.leave()


async def test_a_flood_takes_its_turns() -> None:
    """One read can hold tens of thousands of questions; the loop runs between a few of them."""
    node, num = fake_node(), 3 * MOST_A_TURN + 7
    client = ConnectedClient(node)
    client.send(*[GetStats()] * num)
    assert len(client.transport.stats) == MOST_A_TURN and not client.transport.reads
    answered = []
    while not client.transport.reads:
        await asyncio.sleep(0)
        answered.append(len(client.transport.stats))
    assert answered == [2 * MOST_A_TURN, 3 * MOST_A_TURN, num]
    client.send(GetStats())
    assert len(client.transport.stats) == num + 1
    client.leave()


async def test_messages_of_a_flood_keep_their_order() -> None:
    node = fake_node()
    client = ConnectedClient(node)
    client.send(*[Abort(9)] * MOST_A_TURN, SUBMIT, Abort(1))
    assert client.connection.stream.requests == {}
    await asyncio.sleep(0)
    (end,) = client.transport.ends[1]
    assert end.code == "cancelled" and client.transport.reads
    client.leave()


async def test_whoever_leaves_in_a_flood_is_forgotten() -> None:
    node = fake_node()
    client = ConnectedClient(node)
    client.send(*[GetStats()] * MOST_A_TURN, SUBMIT)
    client.leave()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not node.coordinator.requests and not node.coordinator.streams


async def test_garbage_late_in_a_flood_ends_the_connection() -> None:
    client = ConnectedClient(fake_node())
    client.feed(frame(b"\x92\x01\x09") * MOST_A_TURN + frame(b"\xc1") + frame(b"\x91\x02"))
    assert not client.transport.closed
    await asyncio.sleep(0)
    assert [goodbye.code for goodbye in client.transport.goodbyes] == ["protocol"]
    assert client.transport.stats == []
    client.leave()


async def test_frames_that_are_not_complete_share_what_there_is_for_all() -> None:
    node, incoming = fake_node(), Backlog(100_000)
    limits = replace(LIMITS, incoming=incoming, max_connections=9)
    clients = [ConnectedClient(node, limits) for _ in range(4)]
    begun = HEADER.pack(MAX_FRAME_BYTES) + bytes(40_000)
    for client in clients[:2]:
        client.feed(begun)
    assert [one.transport.closed for one in clients] == [False, True, False, False]
    assert [goodbye.code for goodbye in clients[1].transport.goodbyes] == ["overloaded"]
    assert incoming.left_bytes == 100_000 - len(begun), "nothing is kept of who was closed"
    whole = frame(TO_SERVER.encode(SUBMIT))
    clients[2].feed(whole[:-1])
    clients[2].feed(whole[-1:])
    assert len(node.coordinator.requests) == 1, "there is room for little ones"
    clients[3].feed(begun[:20_000])
    for client in clients:
        client.leave()
    assert incoming.left_bytes == 100_000


async def test_messages_that_wait_for_their_turn_share_it_too() -> None:
    """They were in nobody's books: as many connections, as many frames of the greatest length."""
    node, incoming = fake_node(), Backlog(100_000)
    limits = replace(LIMITS, incoming=incoming, max_connections=9)
    clients = [ConnectedClient(node, limits) for _ in range(3)]
    large = frame(TO_SERVER.encode(SUBMIT._replace(token_ids=bytes(40_000))))
    questions = frame(TO_SERVER.encode(GetStats())) * MOST_A_TURN
    clients[0].feed(large + large[:9])
    assert incoming.left_bytes == 100_000 - 9, "what was taken is kept no more"
    for client in clients[1:]:
        client.feed(questions + large)
    assert [one.transport.closed for one in clients] == [False, False, True]
    assert [one.code for one in clients[2].transport.goodbyes] == ["overloaded"]
    await asyncio.sleep(0)
    assert incoming.left_bytes == 100_000 - 9 and not clients[1].transport.closed
    for client in clients:
        client.leave()
    assert incoming.left_bytes == 100_000


class Looks:
    """The loop's `call_later`, by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.due: list[Callable[[], None]] = []
        monkeypatch.setattr(asyncio.get_running_loop(), "call_later", self._call_later)

    def _call_later(self, delay_s: float, action: Callable[[], None]) -> asyncio.TimerHandle:
        self.due.append(action)
        loop = asyncio.get_running_loop()
        return asyncio.TimerHandle(loop.time() + delay_s, action, (), loop)

    def look(self) -> None:
        (action,) = self.due
        self.due.clear()
        action()


async def test_a_frame_has_to_end_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, client = Looks(monkeypatch), ConnectedClient(fake_node())
    data = frame(TO_SERVER.encode(GetStats()))
    client.feed(data[:1])
    for num in range(1, 5):
        for _ in range(FRAME_LOOKS - 1):
            looks.look()
        client.feed(data[1:] + data[:1])
        assert len(client.transport.stats) == num and len(looks.due) == 1
    for _ in range(FRAME_LOOKS):
        assert not client.transport.closed
        looks.look()
    assert [one.code for one in client.transport.goodbyes] == ["protocol"]
    assert "did not end in 30 s" in client.transport.goodbyes[0].message
    assert not looks.due
    client.leave()


async def test_one_client_too_many_is_turned_away() -> None:
    node = fake_node()
    clients = [ConnectedClient(node, replace(LIMITS, max_connections=1)) for _ in range(2)]
    assert [one.transport.closed for one in clients] == [False, True]
    assert clients[1].transport.hellos == []
    for client in clients:
        client.leave()
