"""Collectives through shared memory, with threads for members: calls release the GIL."""

import mmap
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pytest

from nodeserve import _host

SLOT_BYTES = 256
TIMEOUT_S = 30.0
T = TypeVar("T")


def members(size: int, timeout_s: float = TIMEOUT_S) -> list[_host.Meeting]:
    memory = mmap.mmap(-1, _host.meeting_bytes(size, SLOT_BYTES))
    return [_host.Meeting(memory, rank, size, timeout_s) for rank in range(size)]


def together(
    size: int, call: Callable[[int, _host.Meeting], T], timeout_s: float = TIMEOUT_S
) -> list[T]:
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(call, range(size), members(size, timeout_s)))


def address(values: np.ndarray) -> int:
    return int(values.ctypes.data)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_sums_of_any_length_are_added_in_the_order_of_ranks(size: int) -> None:
    """One value, a slot's worth, one more, many rounds; numbers whose order shows in the sum."""
    lengths = [1, 63, 64, 65, 1000]
    given = [
        [np.random.default_rng(100 * rank + n).normal(0, 10.0**rank, n).astype(np.float32)
         for n in lengths]
        for rank in range(size)
    ]  # fmt: skip

    def call(rank: int, meeting: _host.Meeting) -> list[np.ndarray]:
        mine = [values.copy() for values in given[rank]]
        for values in mine:
            meeting.all_reduce(address(values), len(values))
        return mine

    found = together(size, call)
    for number in range(len(lengths)):
        expected = given[0][number].copy()
        for rank in range(1, size):
            expected += given[rank][number]
        for rank in range(size):
            assert np.array_equal(found[rank][number], expected)


def test_many_rounds_never_mix() -> None:
    """Members that are late by turns: nobody overwrites what another has not read."""

    def call(rank: int, meeting: _host.Meeting) -> list[float]:
        chance = random.Random(rank)
        values, found = np.zeros(3, np.float32), []
        for step in range(500):
            for _ in range(chance.choice([0, 0, 0, 500])):
                pass
            values[:] = step + 1000 * rank
            meeting.all_reduce(address(values), 3)
            found.append(float(values[1]))
        return found

    expected = [3.0 * step + 3000 for step in range(500)]
    assert together(3, call) == [expected] * 3


@pytest.mark.parametrize("num_bytes", [1, SLOT_BYTES, 1000])
def test_rank_0_gathers_what_all_have(num_bytes: int) -> None:
    def call(rank: int, meeting: _host.Meeting) -> np.ndarray:
        mine = np.full(num_bytes, rank + 1, np.uint8)
        out = np.zeros(3 * num_bytes, np.uint8)
        meeting.gather(address(mine), num_bytes, 0 if rank else address(out))
        return out

    first, *others = together(3, call)
    assert first.tolist() == [1] * num_bytes + [2] * num_bytes + [3] * num_bytes
    assert not any(out.any() for out in others)


def test_everybody_sends_to_everybody() -> None:
    """Random amounts, many of them nothing, some above a slot."""
    chance, size = random.Random(5), 4
    rounds = [
        [[chance.choice([0, 0, 1, 7, 300]) for _ in range(size)] for _ in range(size)]
        for _ in range(20)
    ]

    def piece(number: int, giver: int, taker: int) -> list[int]:
        count = rounds[number][giver][taker]
        return [(number + 17 * giver + 5 * taker + i) % 251 for i in range(count)]

    def call(rank: int, meeting: _host.Meeting) -> list[list[int]]:
        found = []
        for number, amounts in enumerate(rounds):
            mine = [byte for taker in range(size) for byte in piece(number, rank, taker)]
            taken = [amounts[giver][rank] for giver in range(size)]
            x, out = np.array(mine + [0], np.uint8), np.zeros(sum(taken) + 1, np.uint8)
            meeting.all_to_all(address(x), amounts[rank], address(out), taken)
            found.append(out[:-1].tolist())
        return found

    for rank, found in enumerate(together(size, call)):
        for number, got in enumerate(found):
            assert got == [byte for giver in range(size) for byte in piece(number, giver, rank)]


def test_members_that_disagree_on_an_amount_are_told() -> None:
    def call(rank: int, meeting: _host.Meeting) -> str:
        x = np.zeros(8, np.uint8)
        try:
            meeting.all_to_all(address(x), [2, 4], address(x), [2, 2] if rank == 0 else [4, 5])
        except (ValueError, RuntimeError) as error:
            return str(error)
        return ""

    assert together(2, call, timeout_s=4.0) == [
        "member 1 does not come to round 2",
        "member 1 gives 4 bytes, expected are 5",
    ]


def test_a_member_that_does_not_come_is_named() -> None:
    first, _ = members(2, timeout_s=0.01)
    values = np.zeros(1, np.float32)
    with pytest.raises(RuntimeError, match="member 1 does not come to round 1"):
        first.all_reduce(address(values), 1)


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_ranks_that_cannot_be_are_refused(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match="rank must be below size"):
        _host.Meeting(bytearray(4096), rank, size, TIMEOUT_S)


def test_memory_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="room for two slots of each member"):
        _host.Meeting(mmap.mmap(-1, 256), 0, 2, TIMEOUT_S)
