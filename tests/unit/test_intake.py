"""Clients' messages are taken in turns, so that none of them holds up the loop."""

from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeserve.coordinator.intake import MOST_A_TURN, SHARE, Intake


class Loop:
    """Turns by hand."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []

    def call_soon(self, call: Callable[[], None]) -> None:
        self.soon.append(call)

    def turn(self) -> None:
        calls, self.soon = self.soon, []
        for call in calls:
            call()


class Client:
    """A connection; what it sends is numbers."""

    def __init__(self, intake: Intake, taken: list[tuple[str, int]], name: str) -> None:
        self.intake = intake
        self.taken = taken
        self.name = name
        self.waiting: deque[int] = deque()
        self.reads = True
        self.num_sent = 0

    def send(self, count: int) -> None:
        waits = bool(self.waiting)
        self.waiting.extend(range(self.num_sent, self.num_sent + count))
        self.num_sent += count
        if not waits and self.waiting:
            self.intake.offer(self)

    def take(self, most: int) -> int:
        num_taken = min(most, len(self.waiting))
        self.taken += [(self.name, self.waiting.popleft()) for _ in range(num_taken)]
        return num_taken

    def drained(self) -> bool:
        self.reads = not self.waiting
        return self.reads


@pytest.fixture
def loop() -> Loop:
    return Loop()


def test_what_little_comes_is_taken_at_once(loop: Loop) -> None:
    taken: list[tuple[str, int]] = []
    client = Client(Intake(loop.call_soon), taken, "a")
    for _ in range(5):
        client.send(2)
    assert taken == [("a", number) for number in range(10)] and client.reads
    loop.turn()
    loop.turn()
    assert not loop.soon, "an idle node has nothing to count"


def test_a_flood_is_taken_in_turns_and_not_read_meanwhile(loop: Loop) -> None:
    taken: list[tuple[str, int]] = []
    client = Client(Intake(loop.call_soon), taken, "a")
    client.send(3 * MOST_A_TURN + 1)
    for turn in range(1, 4):
        assert len(taken) == turn * MOST_A_TURN and not client.reads
        loop.turn()
    assert len(taken) == 3 * MOST_A_TURN + 1 and client.reads
    assert [number for _, number in taken] == list(range(len(taken)))


def test_who_asks_little_does_not_wait_behind_a_flood(loop: Loop) -> None:
    taken: list[tuple[str, int]] = []
    intake = Intake(loop.call_soon)
    flood, modest = Client(intake, taken, "flood"), Client(intake, taken, "modest")
    flood.send(100 * MOST_A_TURN)
    modest.send(1)
    assert ("modest", 0) not in taken, "this turn was used up"
    loop.turn()
    assert ("modest", 0) in taken
    assert taken.index(("modest", 0)) == MOST_A_TURN + SHARE


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3 * MOST_A_TURN)), max_size=20))
def test_nothing_is_lost_and_everybodys_order_kept(sends: list[tuple[int, int]]) -> None:
    """`sends` are (client, messages); a turn of the loop lies between each two."""
    loop = Loop()
    taken: list[tuple[str, int]] = []
    intake = Intake(loop.call_soon)
    clients = [Client(intake, taken, str(number)) for number in range(4)]
    for number, count in sends:
        before = len(taken)
        clients[number].send(count)
        loop.turn()
        assert len(taken) - before <= 2 * MOST_A_TURN, "what was left of a turn, and the next"
    while loop.soon:
        before = len(taken)
        loop.turn()
        assert len(taken) - before <= MOST_A_TURN
    for client in clients:
        mine = [number for name, number in taken if name == client.name]
        assert mine == list(range(client.num_sent)) and client.reads


def test_a_message_that_breaks_us_holds_up_nobody(loop: Loop) -> None:
    taken: list[tuple[str, int]] = []
    intake = Intake(loop.call_soon)
    bad, good = Breaking(intake, taken, "bad"), Client(intake, taken, "good")
    bad.send(BREAKS_AT + 1)
    good.send(1)
    with pytest.raises(ZeroDivisionError):
        loop.turn()
    while loop.soon:
        loop.turn()
    assert ("good", 0) in taken and good.reads
    assert ("bad", BREAKS_AT) in taken and bad.reads, "what follows its message"
    good.send(3 * MOST_A_TURN)
    while loop.soon:
        loop.turn()
    assert ("good", 3 * MOST_A_TURN) in taken


BREAKS_AT = MOST_A_TURN + 1  # in the second turn


class Breaking(Client):
    """One of its messages meets a bug of ours, and those taken with it are gone."""

    def take(self, most: int) -> int:
        if BREAKS_AT - 1 not in list(self.waiting)[:most]:
            return super().take(most)
        while self.waiting.popleft() != BREAKS_AT - 1:
            pass
        raise ZeroDivisionError
