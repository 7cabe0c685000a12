"""Joint attainment, its interval, and the rates and scales that are read off it."""

import math
from random import Random

import pytest

from nodeserve.plan.goodput import Slo, Tally, crossing, falling, needed_scale, smallest_scale

CHAT = Slo(ttft_s=0.2, tpot_s=0.05)


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "missed"),
    [
        (0.2, 0.05, ()),
        (0.21, 0.05, ("ttft",)),
        (0.1, 0.051, ("tpot",)),
        (0.3, 0.06, ("ttft", "tpot")),
        (0.1, None, ()),  # one token
        (None, None, ("ttft",)),  # no token
    ],
)
def test_both_limits_count_together(
    ttft_s: float | None, tpot_s: float | None, missed: tuple[str, ...]
) -> None:
    assert CHAT.missed(ttft_s, tpot_s) == missed
    assert CHAT.met(ttft_s, tpot_s) is (not missed)


def test_a_limit_that_is_not_there_cannot_be_missed() -> None:
    assert Slo().met(None, 9.0, 9.0)
    assert Slo(e2e_s=1.0).missed(0.1, 0.1, 1.5) == ("e2e",)
    assert Slo(e2e_s=1.0).missed(0.1, 0.1) == ("e2e",)


def test_joint_attainment_is_below_each_part() -> None:
    """Ninety in a hundred meet either limit, but only eighty meet both."""
    times = [(0.3 if i < 10 else 0.1, 0.09 if 10 <= i < 20 else 0.01) for i in range(100)]
    assert sum(Slo(ttft_s=0.2).met(*one) for one in times) == 90
    assert sum(Slo(tpot_s=0.05).met(*one) for one in times) == 90
    assert sum(CHAT.met(*one) for one in times) == 80


def test_the_interval_is_wilsons() -> None:
    """90 of 100 at 95 %: 82.6 % to 94.5 %, as textbooks have it; it never leaves 0 to 1."""
    low, high = Tally(100, 90).interval(0.95)
    assert low == pytest.approx(0.8256, abs=1e-4) and high == pytest.approx(0.9448, abs=1e-4)
    assert list(Tally(20, 20).interval()) == pytest.approx([0.8389, 1.0], abs=1e-4)
    assert list(Tally(20, 0).interval()) == pytest.approx([0.0, 0.1611], abs=1e-4)
    assert Tally(0, 0).interval() == (0.0, 1.0) and Tally(0, 0).share == 0.0


def test_what_an_early_end_left_unknown_widens_the_interval_and_is_no_miss() -> None:
    cut = Tally(40, 10, 60)
    assert cut.share == 0.25 and cut.num_planned == 100
    assert cut.interval() == (Tally(100, 10).interval()[0], Tally(100, 70).interval()[1])
    assert Tally(0, 0, 5).interval()[1] == 1.0


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    random = Random(7)
    held = 0
    for _ in range(600):
        good = sum(random.random() < 0.9 for _ in range(150))
        low, high = Tally(150, good).interval(0.95)
        held += low <= 0.9 <= high
    assert 0.92 <= held / 600 <= 0.98


def test_attainment_that_rises_by_chance_is_pooled() -> None:
    counted = [(1.0, Tally(10, 8)), (2.0, Tally(30, 28)), (4.0, Tally(10, 5)), (3.0, Tally(10, 9))]
    assert falling(counted) == [
        *((1.0, pytest.approx(0.9)), (2.0, pytest.approx(0.9))),
        *((3.0, 0.9), (4.0, 0.5)),
    ]
    assert falling([(1.0, Tally(4, 4)), (2.0, Tally(4, 2))]) == [(1.0, 1.0), (2.0, 0.5)]
    rising = [(float(rate), Tally(10, rate)) for rate in range(5)]
    assert [share for _, share in falling(rising)] == [0.2] * 5
    assert falling([]) == []


def test_crossings_are_on_straight_lines() -> None:
    points = [(2.0, 0.8), (1.0, 1.0), (3.0, 0.2)]
    assert crossing(points, 0.9) == pytest.approx(1.5)
    assert crossing([(1.0, 0.95), (2.0, 0.99)], 0.9) == 2.0
    assert crossing([(1.0, 0.5)], 0.9) is None
    dip = [(1.0, 0.95), (2.0, 0.85), (3.0, 0.95), (4.0, 0.75)]
    assert crossing(dip, 0.9) == pytest.approx(3.25)  # the last way down


def test_the_smallest_scale_makes_just_enough_requests_good() -> None:
    times = [(0.1 * (i + 1), 0.01) for i in range(10)]
    slo = Slo(ttft_s=0.5, tpot_s=0.1)
    scale = smallest_scale([needed_scale(slo, *one) for one in times], 0.9)
    assert scale is not None and scale == pytest.approx(1.8)
    for factor, good in ((scale * 1.0001, 9), (scale * 0.999, 8)):
        assert sum(slo.scaled(factor).met(*one) for one in times) == good
    assert smallest_scale([1.0, math.inf], 0.9) is None
    assert needed_scale(slo, None, None) == math.inf
    assert needed_scale(slo, 0.25, None) == pytest.approx(0.5)
    assert needed_scale(slo, 0.25, 0.3) == pytest.approx(3.0)
