"""What layouts serve at most, on paper: reckoned by hand, and never beaten by a simulation."""

from dataclasses import replace

import pytest

from nodeserve.plan.bounds import Demand, bound, capacity, demand_of, sides
from nodeserve.plan.candidates import Candidate, kinds_of
from nodeserve.plan.estimates import Estimator
from nodeserve.plan.evaluate import count
from nodeserve.plan.goodput import Slo
from nodeserve.policy.cost import StepCost
from tests.unit.test_planner import FAST, PLAIN, question


def test_a_floor_under_passes_bounds_as_well() -> None:
    floor = StepCost(0.050, 0.050, 0.0, 0.0, 0.0, 0.0)
    (kind,) = kinds_of(replace(PLAIN, cost=replace(PLAIN.cost, floor=floor)), 1)
    demand = demand_of([(1000, 11)] * 10)
    one = capacity(kind, demand, Slo(1.0, 0.100), 1000, 64)
    assert one.decode == pytest.approx(64 / (10 * 0.050))  # where the floor is what a pass takes
    assert one.prefill == pytest.approx(1 / 0.110)  # where it is not


def test_capacities_of_a_plain_instance() -> None:
    (kind,) = kinds_of(PLAIN, 1)
    demand = demand_of([(1000, 11)] * 10)
    one = capacity(kind, demand, Slo(1.0, 0.020), 1000, 64)
    assert one.prefill == pytest.approx(1 / 0.110)  # a whole budget a pass
    assert one.decode == pytest.approx(64 / (10 * 0.010 + 64 * 10 * 1e-5))  # 64 sequences
    assert one.mixed < min(one.prefill, one.decode)
    assert one.in_time == 1.0
    assert capacity(kind, demand, Slo(0.1, 0.020), 1000, 64).in_time == 0.0
    assert capacity(kind, demand, Slo(1.0, 0.009), 1000, 64).decode == 0.0  # a pass takes 10 ms


def test_memory_bounds_decoding() -> None:
    (kind,) = kinds_of(replace(PLAIN, num_kv_tokens=10_055), 1)
    demand = demand_of([(1000, 11)] * 10)  # 1,005.5 tokens of context: ten sequences fit
    one = capacity(kind, demand, Slo(1.0, 1.0), 1000, 64)
    assert one.decode == pytest.approx(10 / (10 * 0.010 + 10 * 10 * 1e-5))


@pytest.mark.parametrize("layout", ["2m", "1p1d", "1p1m", "1d1m"])
@pytest.mark.parametrize("slo", [Slo(0.3, 0.015), Slo(2.0, None)], ids=["tight", "loose"])
def test_no_simulation_beats_its_bound(layout: str, slo: Slo) -> None:
    asked = question(workload="synthetic(lognormal:500,20)", slo=slo)
    candidate = Candidate(layout, 1024)
    estimator = Estimator(asked, FAST)
    most = estimator.most(candidate)
    tally, _ = count(asked, candidate, 1.3 * most, 600)
    assert 0.0 < most < 1000.0
    assert tally.share < asked.goal


def test_bounds_grow_with_instances() -> None:
    kinds = kinds_of(PLAIN, 4)
    short, long = demand_of([(500, 8)]), demand_of([(10, 1000)])

    def most(layout: str, demand: Demand) -> float:
        return bound(Candidate(layout, 1024), kinds, demand, Slo(1.0, 1.0), 0.9, 64)

    assert most("3p1d", short) == pytest.approx(3 * most("1p1d", short))
    assert most("1p3d", short) == pytest.approx(most("1p1d", short))
    assert most("1p3d", long) == pytest.approx(3 * most("1p1d", long))
    assert most("4m", short) == pytest.approx(2 * most("2m", short))
    # Prompts of ten tokens take next to nothing of a mixed instance's time.
    assert most("1p1d2m", long) == pytest.approx(3 * most("1p1d", long), rel=0.01)
    assert most("1p3m", long) == pytest.approx(3 * most("1p1d", long), rel=0.01)


def test_mixed_instances_share_their_time_between_phases() -> None:
    """A pass of 100 ms at most, 10 of them fixed: prompts of 450 tokens take 45 ms and 44 more
    sequences' steps another 45, so that an instance does both for one request in 90 ms of work."""
    profile = replace(PLAIN, cost=StepCost(0.010, 0.010, 1e-4, 0.0, 1e-3, 0.0))
    kinds, demand = kinds_of(profile, 4), demand_of([(450, 46)])
    one = capacity(kinds[0], demand, Slo(None, 0.1), 1 << 20, 10_000)
    assert one.decode == pytest.approx(20.0)
    assert one.mixed == pytest.approx(10.0)

    def both(layout: str) -> float:
        return sides(Candidate(layout, 1 << 20), kinds, demand, Slo(None, 0.1), 10_000).both

    assert both("4m") == pytest.approx(40.0)
    assert both("1p1d") == pytest.approx(20.0)
    # Half of each mixed instance's work for a request goes on its prompt: freed of all of it by
    # others it does twice as many.
    assert both("1p1m") == pytest.approx(20.0)
    # At 22.2 a second the prefill instance is full: of 3 mixed ones' 60 decodes a second, the rest
    # is shared between prompts and decodes.
    full = 1.0 / 0.045
    assert both("1p3m") == pytest.approx((60.0 + full) / 2, rel=0.01)
    assert both("1d3m") == pytest.approx((60.0 + 20.0) / 2)
