"""The numbers that a simulation is judged by, on runs made by hand."""

from typing import Any

import pytest

from nodeserve.plan.records import Arrival, Outcome, Pass, Scenario, Served
from nodeserve.plan.summary import kept, met_slo, spread, summarize
from nodeserve.policy.cost import IDLE, RankWork
from nodeserve.policy.units import DispatchOptions
from nodeserve.types import Timings

SCENARIO = Scenario("2p:ep2,1d", "moe-ep8", DispatchOptions(budget=100))


def served(number: int, ttft_s: float = 1.0, outcome: str = "length", **slo: float) -> Served:
    arrival = Arrival(float(number), 10, 3, **slo)  # type: ignore[arg-type]
    return Served(arrival, Timings(scheduler_wait_s=ttft_s), number + ttft_s + 0.5, outcome, 0.25)


def run(passes: list[Pass], num: int = 20) -> Outcome:
    return Outcome([served(number) for number in range(num)], passes, 100.0)


def a_pass(instance: int, began_s: float, *tokens: int) -> Pass:
    works = tuple(RankWork(count, 0.0) if count else IDLE for count in tokens)
    return Pass(instance, began_s, 1.0, 0.5, works)


def test_percentiles_lie_between_values() -> None:
    four = spread([4.0, 1.0, 3.0, 2.0])
    assert (four.mean, four.p50) == (2.5, 2.5)
    assert four.p90 == pytest.approx(3.7)
    one = spread([2.0])
    assert (one.p50, one.p99) == (2.0, 2.0)


def test_the_start_and_the_end_are_left_out() -> None:
    assert [one.arrival.arrived_s for one in kept(run([]).served)] == [
        float(i) for i in range(3, 19)
    ]
    assert len(kept([served(0)])) == 1


def test_stages_and_rates() -> None:
    summary = summarize(run([]), SCENARIO)
    assert summary is not None and summary.prefill is None
    assert summary.num_requests == 16 and summary.duration_s == 15.0
    assert summary.ttft_s.mean == 1.0 and summary.stages["scheduler_wait_s"].p99 == 1.0
    assert summary.stages["device_wait_s"].mean == 0.0
    assert summary.tpot_s is not None and summary.tpot_s.mean == 0.25
    assert summary.requests_per_s == pytest.approx(16 / 15)
    assert summary.attained is None and summary.goodput_per_s is None


def test_one_request_has_no_rates() -> None:
    summary = summarize(run([a_pass(0, 0.0, 10, 0)], num=1), SCENARIO)
    assert summary is not None and summary.prefill is not None
    assert (summary.requests_per_s, summary.prefill.busy_share) == (0.0, 0.0)


def test_nobody_served_is_no_summary() -> None:
    lost = Outcome([served(0, outcome="worker_lost")], [], 1.0)
    assert summarize(lost, SCENARIO) is None


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        ({}, True),
        ({"ttft_slo_s": 1.0}, True),
        ({"ttft_slo_s": 0.9}, False),
        ({"tpot_slo_s": 0.25}, True),
        ({"tpot_slo_s": 0.2}, False),
        ({"ttft_slo_s": 2.0, "tpot_slo_s": 0.2}, False),
    ],
)
def test_slos(slo: dict[str, Any], met: bool) -> None:
    assert met_slo(served(0, **slo)) is met
    assert not met_slo(served(0, outcome="overloaded", **slo))


def test_refused_requests_are_missed_ones() -> None:
    outcome = run([])
    outcome.served = [
        served(number, outcome="overloaded" if number % 2 else "length", ttft_slo_s=2.0)
        for number in range(20)
    ]
    summary = summarize(outcome, SCENARIO)
    assert summary is not None
    assert summary.attained == 0.5 and summary.goodput_per_s == pytest.approx(8 / 15)
    assert summary.outcomes == {"length": 10, "overloaded": 10}


def test_passes_are_judged_inside_the_kept_time() -> None:
    passes = [
        a_pass(0, 1.0, 100, 100),  # before
        a_pass(0, 5.0, 100, 0),
        a_pass(1, 5.5, 50, 50),
        a_pass(0, 7.0, 0, 0),  # nothing to prefill
        a_pass(2, 8.0, 0),  # decodes
        a_pass(1, 50.0, 1, 1),  # after
    ]
    summary = summarize(run(passes), SCENARIO)
    assert summary is not None and summary.prefill is not None
    prefill = summary.prefill
    assert prefill.num_passes == 2
    assert prefill.chunk_utilisation == pytest.approx(200 / 400)
    assert prefill.balance == pytest.approx((0.5 + 1.0) / 2)
    assert prefill.active_ranks == 1.5
    assert prefill.busy_share == pytest.approx(3.0 / (2 * 15.0))
    assert prefill.gap_s == 0.5
    assert prefill.phase_spread == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("offset", "expected"), [(0.5, 1.0), (0.25, 0.0), (0.0, -1.0)], ids=["even", "quarter", "same"]
)
def test_phases_of_two_instances(offset: float, expected: float) -> None:
    passes = [
        a_pass(instance, 4.0 + number + (0.999 * offset if instance else 0.0), 10, 10)
        for number in range(8)
        for instance in (0, 1)
    ]
    summary = summarize(run(passes), SCENARIO)
    assert summary is not None and summary.prefill is not None
    assert summary.prefill.phase_spread == pytest.approx(expected, abs=0.1)


def test_one_instance_has_no_phase() -> None:
    passes = [a_pass(0, 4.0 + number, 10, 10) for number in range(8)]
    summary = summarize(run(passes), SCENARIO)
    assert summary is not None and summary.prefill is not None
    assert summary.prefill.phase_spread is None
