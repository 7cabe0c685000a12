"""How long a node waits before it starts a dead worker again, and when it gives it up."""

import pytest

from nodeserve.policy.restarts import RestartOptions, Restarts


def test_deaths_in_a_row_wait_longer_each_time_and_then_it_is_over() -> None:
    restarts = Restarts(RestartOptions(max_restarts=5, first_delay_s=0.5, longest_delay_s=3.0))
    assert [restarts.died(float(at_s)) for at_s in range(6)] == [0.5, 1.0, 2.0, 3.0, 3.0, None]


def test_old_deaths_are_forgotten() -> None:
    restarts = Restarts(RestartOptions(max_restarts=2, first_delay_s=1.0, window_s=100.0))
    assert [restarts.died(at_s) for at_s in (0.0, 50.0)] == [1.0, 2.0]
    assert restarts.died(120.0) == 2.0, "the first is over"
    assert restarts.died(260.0) == 1.0, "and now they all are"
    assert [restarts.died(at_s) for at_s in (261.0, 262.0)] == [2.0, None]


def test_with_no_restarts_the_first_death_is_the_last() -> None:
    assert Restarts(RestartOptions(max_restarts=0)).died(7.0) is None


@pytest.mark.parametrize("deaths", [1, 60, 5000])
def test_a_long_row_of_deaths_still_has_a_delay(deaths: int) -> None:
    """Two to the power of the deaths is no float after a thousand of them."""
    restarts = Restarts(RestartOptions(max_restarts=10_000, longest_delay_s=30.0))
    for _ in range(deaths):
        wait_s = restarts.died(0.0)
    assert wait_s == (0.5 if deaths == 1 else 30.0)
