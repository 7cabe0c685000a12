"""Water-filling and round robin over the units of one instance."""

import random

import pytest

from nodeserve.policy.account import Account
from nodeserve.policy.prefill_allocation import RoundRobin, WaterFilling, fits, uncached
from nodeserve.policy.units import Unit, Waiting
from nodeserve.types import Load

MANY = 10_000


def units_of(*free_blocks: int) -> list[Unit]:
    return [Unit(10 + place, 0, Account(free)) for place, free in enumerate(free_blocks)]


def waiting(num_tokens: int, num_blocks: int = 1, hits: dict[int, int] | None = None) -> Waiting:
    return Waiting(1, num_tokens, num_blocks, 0.0, hits=hits or {})


@pytest.mark.parametrize(
    ("rooms", "lengths", "picked"),
    [
        ([100, 100], [60, 50, 30], [10, 11, 11]),  # 40 | 50 left: the third goes to the fuller room
        ([100, 80], [10, 10, 10], [10, 10, 11]),  # the lowest level rises first
        ([100, 80], [30, 5, 1], [10, 11, 11]),
        ([50, -20], [40, 40, 1], [10, 10, None]),  # a debt of earlier passes takes nobody
        ([10, 5], [500, 3], [10, 11]),  # longer than the room: it spans passes
    ],
)
def test_the_emptiest_unit_gets_the_next(
    rooms: list[int], lengths: list[int], picked: list[int | None]
) -> None:
    units = units_of(*[MANY] * len(rooms))
    filling = WaterFilling(units, {10 + at: room for at, room in enumerate(rooms)}, 100)
    assert [filling.pick(waiting(n), 64) for n in lengths] == picked


@pytest.mark.parametrize(
    ("num_tokens", "hits", "may_split", "picked"),
    [
        (50, {}, True, 10),
        (50, {}, False, None),
        (40, {}, False, 10),
        (101, {}, False, 10),  # no pass would hold it
        (50, {11: 20}, False, 11),  # 30 have to be computed
        (50, {11: 5}, False, None),
    ],
)
def test_a_prompt_that_a_pass_would_hold_is_not_begun_in_the_rest_of_one(
    num_tokens: int, hits: dict[int, int], may_split: bool, picked: int | None
) -> None:
    filling = WaterFilling(units_of(MANY, MANY), {10: 40, 11: 30}, 100)
    assert filling.pick(waiting(num_tokens, hits=hits), 64, may_split) == picked


def test_what_a_pass_would_hold_is_less_where_sequences_run() -> None:
    units = units_of(MANY, MANY)
    units[1].account.report(Load(20, 0, 0, MANY, 0, 0))
    filling = WaterFilling(units, {10: 85, 11: 80}, 100)
    assert filling.pick(waiting(90), 64, may_split=False) == 11, "80 is all that it will ever have"
    assert filling.pick(waiting(95), 64, may_split=False) is None, "the other may hold it whole"


@pytest.mark.parametrize("kind", ["water-filling", "round-robin"])
def test_what_is_booked_is_what_has_to_be_computed(kind: str) -> None:
    units = units_of(MANY)
    filling = (
        WaterFilling(units, {10: 100}, 100)
        if kind == "water-filling"
        else RoundRobin(units, {10: 100}, 0)
    )
    assert filling.pick(waiting(50, hits={10: 20}), 64) == 10
    assert units[0].account.outstanding_tokens == 30
    assert filling.room == 70


def test_what_is_picked_is_booked_and_an_instance_says_what_room_is_left() -> None:
    units = units_of(MANY, MANY)
    filling = WaterFilling(units, {10: 20, 11: 10}, 100)
    assert filling.room == 30
    filling.pick(waiting(20, 2), 64)
    filling.pick(waiting(10, 1), 64)
    assert filling.room == 0
    assert [unit.account.outstanding_tokens for unit in units] == [20, 10]
    assert units[0].account.free_blocks == MANY - 2


def test_a_unit_without_memory_or_slots_is_passed_over() -> None:
    units = units_of(MANY, MANY)
    units[0].account.report(Load(0, 3, 0, 4, 0, 0))  # four blocks, three sequences
    filling = WaterFilling(units, {10: 100, 11: 50}, 100)
    assert filling.pick(waiting(10, 5), 64) == 11, "too few blocks"
    assert filling.pick(waiting(10, 4), 3) == 11, "no slot"
    assert filling.pick(waiting(10, 4), 64) == 10


def test_a_unit_that_holds_nothing_takes_what_can_never_fit() -> None:
    """The worker refuses it with a typed error; here it would wait for ever."""
    [unit] = units_of(2)
    assert fits(unit, waiting(1000, 99), 64)
    unit.account.send(1, 1)
    assert not fits(unit, waiting(1000, 99), 64)


def test_of_equal_rooms_the_one_with_more_memory_wins() -> None:
    units = units_of(50, 60, 60)
    filling = WaterFilling(units, {10: 100, 11: 100, 12: 100}, 100)
    assert filling.pick(waiting(1), 64) == 11


@pytest.mark.parametrize(
    ("rooms", "hits", "picked"),
    [
        ([100, 100], {11: 60}, 11),  # the cached part need not be computed
        ([100, 60], {11: 60}, 11),  # 20 and 40 would be left
        ([100, 30], {11: 60}, 11),  # 20 and 10: within a quarter of the budget, so it sticks
        ([100, 5], {11: 40}, 10),  # 20 and -35: load goes before a hit
        ([100, -5], {11: 79}, 10),  # no room in the pass that comes
    ],
)
def test_a_cached_prefix_is_weighed_against_load(
    rooms: list[int], hits: dict[int, int], picked: int
) -> None:
    filling = WaterFilling(units_of(MANY, MANY), {10: rooms[0], 11: rooms[1]}, 100)
    assert filling.pick(waiting(80, hits=hits), 64) == picked


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token() -> None:
    assert uncached(waiting(80, hits={10: 80}), 10) == 1
    assert uncached(waiting(80, hits={10: 64}), 11) == 80


def test_round_robin_goes_on_where_it_stopped() -> None:
    units = units_of(MANY, MANY, MANY)
    rooms = {10: 100, 11: 100, 12: 100}
    first = RoundRobin(units, rooms, 0)
    assert [first.pick(waiting(1), 64) for _ in range(4)] == [10, 11, 12, 10]
    assert RoundRobin(units, rooms, first.next).pick(waiting(1), 64) == 11
    small = RoundRobin(units, {10: 0, 11: 5, 12: 5}, 0)
    assert [small.pick(waiting(5), 64) for _ in range(3)] == [11, 12, None]
    assert small.room == 0


@pytest.mark.parametrize("seed", range(10))
def test_water_filling_bounds_the_spread_by_one_prompt(seed: int) -> None:
    """Greedy by the highest room: no two units end further apart than the longest prompt."""
    rng = random.Random(seed)
    units = units_of(*[MANY] * 8)
    filling = WaterFilling(units, {unit.index: 4096 for unit in units}, 4096)
    lengths = [rng.randint(1, 800) for _ in range(100)]
    for num_tokens in lengths:
        filling.pick(waiting(num_tokens), 64)
    levels = [unit.account.outstanding_tokens for unit in units]
    assert max(levels) - min(levels) <= max(lengths)
