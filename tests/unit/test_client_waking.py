"""A frame with tokens of many requests: their takers are woken some at a time, and miss nothing."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from nodeserve.client.connection import WOKEN_AT_ONCE, Arrival, Connection
from nodeserve.client.mailbox import Mailbox
from nodeserve.wire.frames import frame
from nodeserve.wire.messages import TO_CLIENT, End, ToClient, Tokens, pack_ids
from tests.fuzz.seeds import HELLO

COUNT = 3 * WOKEN_AT_ONCE + 1


class Sink(asyncio.Transport):
    def write(self, data: Any) -> None:
        pass


async def connected() -> tuple[Connection, list[Mailbox[Any]]]:
    """With COUNT requests, whose ids are 0, 1, ..."""
    connection = Connection()
    connection.connection_made(Sink())
    connection.data_received(HELLO)
    return connection, [(await connection.submit(b"", {}, None, 0))[1] for _ in range(COUNT)]


def receive(connection: Connection, *messages: ToClient) -> None:
    """All in one read."""
    connection.data_received(b"".join(frame(TO_CLIENT.encode(one)) for one in messages))


def one_each(token_id: int) -> Tokens:
    return Tokens([[request_id, pack_ids([token_id]), None] for request_id in range(COUNT)])


def ended(request_id: int) -> End:
    return End(request_id, "length", None, "", {}, {}, None)


async def taken(mailbox: Mailbox[Any], seen: list[Any]) -> None:
    """Every event up to the end goes to `seen`."""
    while True:
        for event in await mailbox.take():
            seen.append(event)
            if not isinstance(event, Arrival):
                return


async def test_the_first_takers_run_before_the_last_are_woken() -> None:
    connection, mailboxes = await connected()
    woken: list[int] = []

    async def take(number: int) -> None:
        await mailboxes[number].take()
        woken.append(number)

    tasks = [asyncio.ensure_future(take(number)) for number in range(COUNT)]
    await asyncio.sleep(0)
    receive(connection, one_each(5))
    assert not woken
    counts = []
    while len(woken) < COUNT:
        await asyncio.sleep(0)
        counts.append(len(woken))
    assert woken == list(range(COUNT))
    assert set(counts) >= {WOKEN_AT_ONCE, 2 * WOKEN_AT_ONCE, 3 * WOKEN_AT_ONCE}
    await asyncio.gather(*tasks)


async def test_an_end_overtakes_the_waking_and_no_token() -> None:
    """The end wakes at once, and what is woken for tokens that were taken with it waits again."""
    connection, mailboxes = await connected()
    seen: list[list[Any]] = [[] for _ in mailboxes]
    tasks = [
        asyncio.ensure_future(taken(mailbox, events))
        for mailbox, events in zip(mailboxes, seen, strict=True)
    ]
    await asyncio.sleep(0)
    last = COUNT - 1
    receive(connection, one_each(5), one_each(6), ended(last))
    await tasks[last]
    assert len(seen[last]) == 3
    receive(connection, one_each(7), *(ended(request_id) for request_id in range(last)))
    await asyncio.gather(*tasks)
    for events in seen[:last]:
        ids = [event.token_ids for event in events if isinstance(event, Arrival)]
        assert ids == [pack_ids([token_id]) for token_id in (5, 6, 7)] and len(events) == 4


async def test_a_taker_that_is_woken_for_nothing_waits_on() -> None:
    connection, mailboxes = await connected()
    last = mailboxes[-1]
    receive(connection, one_each(5))
    assert len(await last.take()) == 1  # before its turn
    again = asyncio.ensure_future(last.take())
    for _ in range(COUNT):
        await asyncio.sleep(0)
    assert not again.done()
    receive(connection, one_each(6))
    assert [event.token_ids for event in await again] == [pack_ids([6])]


async def test_what_is_poured_passes_with_no_task_between() -> None:
    """As many as are woken at once in the read itself, the others in the loop's next turns."""
    connection, mailboxes = await connected()
    poured: list[list[Any]] = [[] for _ in mailboxes]

    def keeper(events: list[Any]) -> Callable[[list[Any]], bool]:
        def sink(new: list[Any]) -> bool:
            events.extend(new)
            return True

        return sink

    receive(connection, Tokens([[0, pack_ids([4]), None]]))
    tasks = [
        asyncio.ensure_future(mailbox.pour(keeper(events)))
        for mailbox, events in zip(mailboxes, poured, strict=True)
    ]
    await asyncio.sleep(0)
    assert [len(events) for events in poured] == [1] + [0] * (COUNT - 1), "what was there"
    receive(connection, one_each(5))
    assert [bool(events) for events in poured].count(True) == WOKEN_AT_ONCE
    for _ in range(COUNT // WOKEN_AT_ONCE):
        await asyncio.sleep(0)
    assert all(events[-1].token_ids == pack_ids([5]) for events in poured)
    assert not any(task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    receive(connection, one_each(6))
    assert len(await mailboxes[0].take()) == 1, "nobody pours any more"


async def test_what_a_sink_refuses_stays_and_what_it_raises_is_its_tasks() -> None:
    connection, mailboxes = await connected()

    def refuse(events: list[Any]) -> bool:
        return not isinstance(events[-1], End)

    def fail(events: list[Any]) -> bool:
        raise LookupError("the sink's own")

    pouring = asyncio.ensure_future(mailboxes[0].pour(refuse))
    failing = asyncio.ensure_future(mailboxes[1].pour(fail))
    await asyncio.sleep(0)
    receive(connection, one_each(5), ended(0))
    await pouring
    assert [type(event) for event in await mailboxes[0].take()] == [End]
    with pytest.raises(LookupError):
        await failing
    assert connection.usable
    assert len(await mailboxes[1].take()) == 1


@pytest.mark.parametrize("pours", [False, True])
async def test_who_was_cancelled_takes_nothing_from_the_next(pours: bool) -> None:
    """Also where its end comes after the next has begun, as when a recording is cut off."""
    mailbox: Mailbox[int] = Mailbox()
    stolen: list[int] = []

    def sink(events: list[int]) -> bool:
        stolen.extend(events)
        return True

    async def wait() -> None:
        if pours:
            await mailbox.pour(sink)
        else:
            stolen.extend(await mailbox.take())

    first = asyncio.ensure_future(wait())
    await asyncio.sleep(0)
    first.cancel()
    asyncio.get_running_loop().call_later(0.01, mailbox.put, 5)
    assert await mailbox.take() == [5]
    assert first.cancelled() and not stolen
