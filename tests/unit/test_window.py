"""When a batch leaves: the interval, and what cuts it short."""

import math
from collections.abc import Callable

import pytest

from nodeserve.policy.window import ArrivalRate, Constancy, Mean, Moment, Window


def window(fixed_s: float | None = None, k: float = 1.0, pass_s: float | None = 1.0) -> Window:
    made = Window(fixed_s, k)
    made.pass_s = pass_s
    return made


def moment(
    now_s: float,
    free_s: list[float],
    num_waiting: int = 5,
    oldest_s: float = 10.0,
    full: bool = False,
) -> Moment:
    return Moment(now_s, num_waiting, oldest_s, full, free_s)


def dense(made: Window, until_s: float, per_s: float = 100.0) -> Window:
    """So many arrivals that few waiting requests never are a reason to leave."""
    for place in range(int(20 * per_s)):
        made.arrived(until_s - 20 + place / per_s)
    return made


@pytest.mark.parametrize(
    ("fixed_s", "k", "pass_s", "dead_s", "num", "interval_s"),
    [
        (None, 1.0, 0.8, 0.0, 4, 0.2),
        (None, 1.0, 0.8, 0.2, 4, 0.25),
        (None, 0.5, 0.8, 0.0, 4, 0.1),
        (None, 0.0, 0.8, 0.0, 4, 0.0),
        (None, 1.0, 0.8, 0.0, 1, 0.0),  # nothing to alternate with
        (None, 1.0, None, 0.0, 4, 0.0),  # nothing known yet
        (0.05, 1.0, None, 0.0, 4, 0.05),
        (0.05, 1.0, 0.8, 0.0, 1, 0.0),
        (0.0, 1.0, 0.8, 0.0, 4, 0.0),
    ],
)
def test_the_interval(
    fixed_s: float | None,
    k: float,
    pass_s: float | None,
    dead_s: float,
    num: int,
    interval_s: float,
) -> None:
    made = window(fixed_s, k, pass_s)
    made.dead_s = dead_s
    assert made.interval_s(num) == pytest.approx(interval_s)


def test_evenly_spaced_instances_leave_at_the_interval() -> None:
    """Four of them, a pass takes 1 s: the others come free 0.25, 0.5 and 0.75 s after this one."""
    made = dense(window(), 10.0)
    made.departed(10.0)
    assert made.leaves_s(moment(10.1, [10.5, 10.75, 11.0])) == pytest.approx(10.25)
    assert made.leaves_s(moment(10.25, [10.5, 10.75, 11.0])) <= 10.25


def test_a_late_successor_makes_a_batch_wait_for_the_middle() -> None:
    """Two instances: it leaves half-way to the other, but no later than due."""
    made = dense(window(), 10.0)
    made.departed(10.0)
    assert made.leaves_s(moment(10.0, [10.6])) == pytest.approx(10.3)
    assert made.leaves_s(moment(10.0, [11.9])) == pytest.approx(10.5), "never beyond the interval"


def test_a_batch_leaves_at_once_where_the_others_are_free() -> None:
    made = dense(window(), 10.0)
    made.departed(10.0)
    assert made.leaves_s(moment(10.01, [9.0, 9.5, 10.0])) == 10.01


def test_one_free_neighbour_does_not_let_a_bunch_form() -> None:
    """Eight instances start together: the second leaves an eighth of a pass after the first."""
    made = dense(window(), 10.0)
    made.departed(10.0)
    free = [10.0] * 6 + [11.0]
    assert made.leaves_s(moment(10.001, free)) == pytest.approx(10.0 + 1 / 8, abs=0.002)


def test_under_light_load_nobody_is_held() -> None:
    made = window()
    for second in range(10):
        made.arrived(float(second))  # one a second
    made.departed(10.0)
    assert made.leaves_s(moment(10.1, [10.5], num_waiting=1)) == 10.1
    busy = dense(window(), 10.0)
    busy.departed(10.0)
    assert busy.leaves_s(moment(10.1, [10.5], num_waiting=1)) > 10.1


@pytest.mark.parametrize("fixed_s", [None, 0.4])
def test_full_and_old_batches_do_not_wait(fixed_s: float | None) -> None:
    made = dense(window(fixed_s), 10.0)
    made.departed(10.0)
    free = [10.9, 11.0, 11.1]
    assert made.leaves_s(moment(10.1, free, full=True)) == 10.1
    assert made.leaves_s(moment(10.1, free, oldest_s=8.0)) <= 10.1, "older than two passes"
    assert made.leaves_s(moment(10.1, free)) > 10.1


def test_a_fixed_interval_stays_but_for_free_instances() -> None:
    made = window(0.4)
    made.departed(10.0)
    assert made.leaves_s(moment(10.1, [10.2, 11.0], num_waiting=1)) == pytest.approx(10.4)
    assert made.leaves_s(moment(10.1, [9.0, 9.0])) == 10.1


def test_no_window_never_waits() -> None:
    made = window(0.0)
    made.departed(10.0)
    assert made.leaves_s(moment(10.0, [99.0])) == 10.0


def test_an_instance_without_a_prediction_does_not_hold_a_batch_beyond_the_interval() -> None:
    made = dense(window(), 10.0)
    made.departed(10.0)
    assert made.leaves_s(moment(10.0, [math.inf])) == pytest.approx(10.5)


def test_means_start_with_their_first_sample() -> None:
    mean = Mean()
    mean.add(4.0)
    assert mean.value == 4.0
    mean.add(14.0)
    assert mean.value == pytest.approx(5.0)


def test_the_arrival_rate_follows_and_forgets() -> None:
    rate = ArrivalRate()
    for place in range(1000):
        rate.add(place / 100, 1.0)
    assert rate.per_s(10.0, 1.0) == pytest.approx(100, rel=0.02)
    assert rate.per_s(15.0, 1.0) < 1.0


@pytest.mark.parametrize(
    ("law", "share"),
    [
        (lambda tokens: 0.3, 1.0),
        (lambda tokens: 1e-4 * tokens, 0.0),
        (lambda tokens: 0.1 + 1e-4 * tokens, 0.5),  # passes of 1,000 tokens on average
        (lambda tokens: 0.4 - 1e-4 * tokens, 1.0),  # noise may look like that
    ],
)
def test_constancy_is_the_part_of_a_pass_that_stays(
    law: Callable[[int], float], share: float
) -> None:
    constancy = Constancy()
    for place in range(300):
        tokens = 500 + place * 7919 % 1001
        constancy.add(tokens, law(tokens))
    assert constancy.share == pytest.approx(share, abs=0.03)


def test_passes_that_grow_with_what_boards_are_not_waited_for() -> None:
    made = dense(window(), 10.0)
    made.departed(10.0)
    assert made.leaves_s(moment(10.0, [10.6])) == pytest.approx(10.3)
    for tokens in range(100, 2000, 10):
        made.constancy.add(tokens, 1e-3 * tokens)
    assert made.leaves_s(moment(10.0, [10.6])) == 10.0
    assert made.interval_s(2) == 0.0
