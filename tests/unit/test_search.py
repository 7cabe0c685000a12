"""The search for the highest rate that passes, against curves whose crossing is known."""

import math
from dataclasses import replace
from random import Random

import pytest

from nodeserve.errors import ConfigError
from nodeserve.plan.goodput import Tally
from nodeserve.plan.search import Probe, SearchOptions, find_goodput


class Curve:
    """Attainment that falls from 1 at the knee, with the noise of a coin for each request."""

    def __init__(self, knee: float, seed: int | None = None, valid_to: float = math.inf) -> None:
        self.knee = knee
        self.valid_to = valid_to
        self.random = Random(seed) if seed is not None else None
        self.asked: list[tuple[float, int]] = []

    def share(self, rate: float) -> float:
        return min(1.0, 0.9 * (self.knee / rate) ** 2)

    def __call__(self, rate: float, num_requests: int) -> Probe:
        self.asked.append((rate, num_requests))
        share = self.share(rate)
        if self.random is None:
            good = round(share * num_requests)
        else:
            good = sum(self.random.random() < share for _ in range(num_requests))
        return Probe(rate, Tally(num_requests, good), rate <= self.valid_to)


@pytest.mark.parametrize("knee", [0.3, 1.0, 7.3, 95.0])
def test_the_knee_is_found_within_the_tolerance(knee: float) -> None:
    found = find_goodput(Curve(knee), SearchOptions(start=2.0, tolerance=0.02))
    assert found.reason == "found"
    assert found.rate <= knee * 1.002 and knee <= found.too_high * 1.002
    assert found.too_high <= found.rate * 1.02


@pytest.mark.parametrize("seed", range(8))
def test_noise_moves_it_by_little(seed: int) -> None:
    found = find_goodput(Curve(10.0, seed), SearchOptions(start=3.0))
    assert found.rate == pytest.approx(10.0, rel=0.06)


def test_more_requests_are_asked_where_the_goal_is_within_the_interval() -> None:
    curve = Curve(10.0)
    find_goodput(curve, SearchOptions(start=10.1, min_requests=100, max_requests=800))
    assert [number for rate, number in curve.asked if rate == 10.1] == [100, 200, 400, 800]
    far = [number for rate, number in curve.asked if rate < 5.1]
    assert far == [100]


def test_a_probe_that_lasts_long_is_repeated_with_twice_its_own_requests_or_not_at_all() -> None:
    long = SearchOptions(10.1, min_requests=100, min_duration_s=30.0, max_requests=800)
    curve = Curve(10.0)
    find_goodput(curve, long)
    assert [number for rate, number in curve.asked if rate == 10.1] == [303, 606, 800]
    longer = replace(long, min_duration_s=100.0)
    curve = Curve(10.0)
    find_goodput(curve, longer)
    assert [number for rate, number in curve.asked if rate == 10.1] == [1010]


def test_an_end_between_its_bounds_is_undecided_unless_the_intervals_say_so() -> None:
    steps = SearchOptions(start=8.0, min_requests=50, max_requests=50, tolerance=0.05)
    assert not find_goodput(Curve(10.0), steps).decided
    wide = SearchOptions(start=5.0, high=10.0, tolerance=1.1, min_requests=2000)
    assert find_goodput(Curve(7.0), wide).decided


def test_bounds_end_it() -> None:
    high = find_goodput(Curve(1e9), SearchOptions(start=4.0, high=30.0))
    assert (high.reason, high.rate, high.too_high) == ("high", 30.0, math.inf)
    low = find_goodput(Curve(1e-9), SearchOptions(start=4.0, low=1.0))
    assert (low.reason, low.rate, low.too_high) == ("low", 0.0, 1.0)
    assert find_goodput(Curve(1e-9), SearchOptions(start=4.0)).reason == "low"


def test_a_probe_that_says_nothing_ends_it_with_what_is_known() -> None:
    found = find_goodput(Curve(50.0, valid_to=20.0), SearchOptions(start=4.0))
    assert (found.reason, found.rate) == ("invalid", 16.0)


def test_there_is_a_limit_of_probes() -> None:
    curve = Curve(1.0)
    found = find_goodput(curve, SearchOptions(start=1e-3, max_probes=5))
    assert found.reason == "probes" and len(curve.asked) == 5


def test_looks_share_the_errors_that_the_confidence_allows() -> None:
    """At the goal itself, little more than one time in ten may anything be decided (Wilson is not
    exact), however often it is looked at; five looks at 90 % each decide every other time."""
    options = SearchOptions(
        10.0, high=10.0, confidence=0.9, min_requests=100, max_requests=1600, max_probes=5
    )
    assert options.look_confidence == pytest.approx(0.98)
    assert replace(options, max_requests=100).look_confidence == pytest.approx(0.9)
    founds = [find_goodput(Curve(10.0, seed), replace(options, low=10.0)) for seed in range(300)]
    assert 0 < sum(found.decided for found in founds) <= 45


def test_options_that_cannot_be() -> None:
    for wrong in (
        {"start": 0.0},
        {"start": 5.0, "high": 4.0},
        {"start": 1.0, "goal": 1.0},
        {"start": 1.0, "min_requests": 0},
    ):
        with pytest.raises(ConfigError):
            SearchOptions(**wrong)  # type: ignore[arg-type]
