"""Sliding rates."""

import pytest

from nodeserve.metrics import Rate


def test_a_rate_is_the_mean_over_its_window_and_forgets() -> None:
    rate = Rate(window_s=10)
    for second in range(20):
        rate.add(50, second + 0.5)
    assert rate.per_s(20.0) == pytest.approx(50, rel=0.1)
    assert rate.total == 1000
    assert rate.per_s(31.0) == 0.0


def test_a_young_rate_is_not_diluted() -> None:
    rate = Rate(window_s=10)
    rate.add(30, 100.2)
    rate.add(30, 101.4)
    assert rate.per_s(102.0) == pytest.approx(30, rel=0.2)
    assert Rate().per_s(5.0) == 0.0
