"""The order in which waiting requests board, and that none is lost on the way."""

import random
from typing import Any

import pytest

from nodeserve.policy.buffer import LATER, MAX_STALE, Buffer
from nodeserve.policy.units import Waiting


def waiting(request_id: int, num_tokens: int = 10, arrived_s: float = 0.0, **more: int) -> Waiting:
    return Waiting(request_id, num_tokens, 1, arrived_s, **more)  # type: ignore[arg-type]


def drain(buffer: Buffer) -> list[int]:
    order = []
    while (first := buffer.first()) is not None:
        buffer.remove(first.request_id)
        order.append(first.request_id)
    return order


@pytest.mark.parametrize(
    ("requests", "order"),
    [
        ([(1, 10), (2, 30), (3, 20)], [1, 2, 3]),
        ([(1, 10, 5.0), (2, 10, 3.0)], [2, 1]),  # put back: its first arrival counts
        ([(1, 10, 0.0, 0), (2, 5, 1.0, 7)], [2, 1]),  # a higher priority, though later
        ([(1, 10, 0.0, -1), (2, 10, 1.0, 0)], [2, 1]),
    ],
)
def test_requests_are_considered_by_class_then_arrival(
    requests: list[tuple[Any, ...]], order: list[int]
) -> None:
    buffer = Buffer(longest_first=False)
    for request_id, num_tokens, *rest in requests:
        buffer.push(Waiting(request_id, num_tokens, 1, *(rest or (0.0,))))
    assert drain(buffer) == order


def test_newcomers_board_longest_first_behind_those_left_behind() -> None:
    buffer = Buffer(longest_first=True)
    for request_id, num_tokens in ((1, 10), (2, 30), (3, 20)):
        buffer.push(waiting(request_id, num_tokens, float(request_id)))
    first = buffer.first()
    assert first is not None and first.request_id == 2
    buffer.remove(2)
    buffer.departed()
    buffer.push(waiting(4, 5, 4.0))
    buffer.push(waiting(5, 50, 5.0))
    assert drain(buffer) == [1, 3, 5, 4]


@pytest.mark.parametrize("longest_first", [False, True])
def test_a_long_prompt_lets_short_ones_pass_that_come_soon_after_it(longest_first: bool) -> None:
    buffer = Buffer(longest_first)
    buffer.token_s = 0.01
    buffer.push(waiting(1, 1000, 0.0))
    buffer.push(waiting(2, 10, 0.9 * LATER * 10.0))
    buffer.push(waiting(3, 10, 1.1 * LATER * 10.0))
    buffer.departed()
    assert drain(buffer) == [2, 1, 3]


def test_tokens_ahead_are_those_that_it_does_not_pass() -> None:
    buffer = Buffer(longest_first=False)
    buffer.push(waiting(1, 1000, 0.0))
    buffer.token_s = 0.01
    for request_id, num_tokens in ((2, 100), (3, 400), (4, 400)):
        buffer.push(waiting(request_id, num_tokens, 1.0))
    of = {length: buffer.tokens_ahead(waiting(9, length, 1.0)) for length in (10, 200, 400)}
    assert of == {10: 1000, 200: 1100, 400: 1900}
    buffer.remove(3)
    assert buffer.tokens_ahead(waiting(9, 400, 1.0)) == 1500


def test_best_effort_boards_behind_those_of_its_priority_that_can_meet_their_slo() -> None:
    buffer = Buffer(longest_first=False)
    buffer.push(Waiting(1, 10, 1, 0.0, best_effort=True))
    buffer.push(Waiting(2, 5, 1, 1.0))
    buffer.push(Waiting(3, 5, 1, 2.0, priority=1, best_effort=True))
    assert drain(buffer) == [3, 2, 1]


def test_rounds_count_the_departures_that_left_it_behind() -> None:
    buffer = Buffer(longest_first=False)
    buffer.departed()
    buffer.push(waiting(1))
    buffer.departed()
    buffer.departed()
    one = buffer.first()
    assert one is not None and buffer.rounds_of(one) == 2
    buffer.remove(1)
    assert one.rounds == 2
    buffer.push(one)  # put back by a lost worker: its rounds still count
    buffer.departed()
    buffer.remove(1)
    assert one.rounds == 3


def test_hidden_requests_are_passed_over_and_come_back() -> None:
    buffer = Buffer(longest_first=False)
    for request_id in (1, 2, 3, 4):
        buffer.push(waiting(request_id, 30, float(request_id)))
    hidden = buffer.hide(31)
    assert [one.request_id for one in hidden] == [1, 2], "up to the one that makes it 31 or more"
    third = buffer.first()
    assert third is not None and third.request_id == 3 and len(buffer) == 4
    buffer.remove(1)
    buffer.show(hidden[1])
    assert drain(buffer) == [2, 3, 4]
    assert buffer.hide(100) == []


def test_tokens_ahead_are_those_of_its_class_and_of_better_ones() -> None:
    buffer = Buffer(longest_first=False)
    buffer.push(waiting(1, 100, priority=1))
    buffer.push(waiting(2, 10))
    buffer.push(Waiting(3, 1000, 1, 0.0, best_effort=True))
    assert buffer.num_tokens == 1110
    assert buffer.tokens_ahead(waiting(9)) == 110
    assert buffer.tokens_ahead(waiting(9, priority=1)) == 100
    assert buffer.tokens_ahead(Waiting(9, 1, 1, 0.0, best_effort=True)) == 1110
    buffer.remove(1)
    assert buffer.tokens_ahead(waiting(9)) == 10


@pytest.mark.parametrize("seed", range(5))
def test_nobody_is_lost_or_boards_twice_in_any_order(seed: int) -> None:
    rng, buffer, here = random.Random(seed), Buffer(longest_first=bool(seed % 2)), set()
    boarded: list[int] = []
    for request_id in range(2000):
        match rng.randrange(4):
            case 0 | 1:
                buffer.push(waiting(request_id, rng.randint(1, 99), request_id * 1.0))
                here.add(request_id)
            case 2 if here:
                gone = rng.choice(sorted(here))
                assert buffer.remove(gone) is not None
                assert buffer.remove(gone) is None
                here.discard(gone)
            case _:
                if (first := buffer.first()) is not None and rng.random() < 0.8:
                    buffer.remove(first.request_id)
                    here.discard(first.request_id)
                    boarded.append(first.request_id)
                buffer.departed()
        assert len(buffer) == len(here)
    assert len(set(boarded)) == len(boarded)
    assert set(drain(buffer)) == here and buffer.num_tokens == 0


def test_entries_of_those_who_left_do_not_pile_up() -> None:
    buffer = Buffer(longest_first=False)
    for request_id in range(10_000):
        buffer.push(waiting(request_id))
        buffer.departed()
        buffer.remove(request_id)
    assert len(buffer._heap) <= MAX_STALE


def test_sweeping_out_stale_entries_does_not_bring_hidden_ones_back() -> None:
    """A request that was considered twice would have departed twice."""
    buffer = Buffer(longest_first=False)
    for request_id in range(1000):
        buffer.push(waiting(request_id, 1, float(request_id)))
    [hidden] = buffer.hide(1)
    for request_id in range(1, 1000):
        buffer.remove(request_id)
    assert buffer.first() is None
    buffer.show(hidden)
    assert drain(buffer) == [0]
