"""Clients of a simulated node that send their next request when the last one has ended."""

import pytest

from nodeserve.errors import ConfigError
from nodeserve.plan.clients import simulate_clients
from nodeserve.plan.records import Arrival
from nodeserve.policy.units import DispatchOptions
from tests.fakes.simulation import PASS_S, STEP_S, TRANSIT_S, scenario

AT_ONCE = DispatchOptions("shortest-queue", budget=4096)


def test_one_client_is_never_two() -> None:
    made = scenario("1m", dispatch=AT_ONCE)
    outcome = simulate_clients(made, [Arrival(0.0, 32, 5)] * 4, 1, 0.0)
    alone_s = 2 * TRANSIT_S + PASS_S + 4 * STEP_S
    begins = [one.arrival.arrived_s for one in outcome.served]
    assert begins == pytest.approx([number * alone_s for number in range(4)])
    assert outcome.duration_s == pytest.approx(4 * alone_s)
    assert all(work.num_decodes <= 1 for one in outcome.passes for work in one.ranks)


def test_clients_spread_evenly_and_there_are_never_more() -> None:
    made = scenario("1m", dispatch=AT_ONCE)
    outcome = simulate_clients(made, [Arrival(0.0, 32, 20)] * 30, 3, 0.6)
    begins = [one.arrival.arrived_s for one in outcome.served]
    assert begins[:3] == pytest.approx([0.0, 0.2, 0.4])
    spans = [(one.arrival.arrived_s, one.ended_s) for one in outcome.served]
    together = [sum(begin <= at < end for begin, end in spans) for at, _ in spans]
    assert max(together) == 3 and together[5:-3].count(3) == len(together[5:-3])
    assert all(one.outcome == "length" for one in outcome.served)


def test_more_clients_than_requests() -> None:
    made = scenario("1m", dispatch=AT_ONCE)
    assert len(simulate_clients(made, [Arrival(9.0, 32, 5)] * 2, 5, 1.0).served) == 2
    with pytest.raises(ConfigError, match="0 clients"):
        simulate_clients(made, [Arrival(0.0, 32, 5)], 0, 1.0)
