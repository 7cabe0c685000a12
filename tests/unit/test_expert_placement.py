"""Where experts go, and their copies."""

import random

import pytest

from nodeserve.policy.expert_placement import Placement, imbalance, place, rows_of


def zipf(num_experts: int, seed: int) -> list[float]:
    """Loads as routers give them: few experts with many rows, in any order."""
    loads = [1000.0 / (place + 1) for place in range(num_experts)]
    random.Random(seed).shuffle(loads)
    return loads


def uneven(placement: Placement, loads: list[float]) -> float:
    return imbalance([rows_of(placement, loads)])


@pytest.mark.parametrize("seed", range(40))
def test_every_expert_is_somewhere_and_no_rank_has_one_twice(seed: int) -> None:
    chance = random.Random(seed)
    num_ranks = chance.randint(1, 9)
    num_experts = chance.randint(num_ranks, 70)
    num_spare = chance.randint(0, num_experts * (num_ranks - 1))
    placement = place(zipf(num_experts, seed), num_ranks, num_spare)
    sizes = [len(held) for held in placement]
    assert {expert for held in placement for expert in held} == set(range(num_experts))
    assert all(len(set(held)) == len(held) for held in placement)
    assert sum(sizes) == num_experts + num_spare
    assert max(sizes) - min(sizes) <= 1


def test_the_hottest_expert_gets_the_copies() -> None:
    assert place([90.0, 10.0, 10.0, 10.0], 4, 2) == ((0, 2), (0, 3), (0,), (1,))


def test_without_spare_slots_hot_experts_go_to_different_ranks() -> None:
    placement = place([50.0, 40.0, 10.0, 1.0], 2)
    assert sorted(placement) == [(0, 3), (1, 2)]
    assert uneven(placement, [50.0, 40.0, 10.0, 1.0]) == pytest.approx(51 / 50.5)


def test_a_copy_of_everything_is_everywhere_at_most() -> None:
    assert place([3.0, 2.0], 3, 100) == ((0, 1),) * 3
    assert place([3.0, 2.0], 1, 5) == ((0, 1),)


def test_nothing_counted_is_balanced() -> None:
    placement = place([0.0] * 8, 4)
    assert sorted(len(held) for held in placement) == [2] * 4
    assert uneven(placement, [0.0] * 8) == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_spare_slots_buy_balance(seed: int) -> None:
    """DeepSeek-V3's 256 experts over 8 ranks: in order, by load, and with 32 second copies."""
    loads = zipf(256, seed)
    in_order = tuple(tuple(range(32 * rank, 32 * rank + 32)) for rank in range(8))
    by_load, with_copies = place(loads, 8), place(loads, 8, 32)
    assert uneven(in_order, loads) > 1.3
    assert uneven(by_load, loads) > 1.2  # the hottest expert alone is more than a rank's share
    assert uneven(with_copies, loads) < 1.01


def test_what_was_measured_is_what_is_served() -> None:
    """A placement is for the counts that it was made from, and pays for others."""
    loads = zipf(64, 1)
    placement = place(loads, 4, 8)
    assert uneven(placement, loads) < uneven(placement, zipf(64, 2))
