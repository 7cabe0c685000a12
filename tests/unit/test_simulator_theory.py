"""Waits that queueing theory knows: constant passes, room for everybody, N instances.

Dispatch on arrival meets a pass that has, on average, half its time to go: T/2, however many
instances there are. Staggered instances come free every T/N: T/(2N).
"""

from dataclasses import replace

import pytest

from nodeserve.plan.records import Scenario
from nodeserve.plan.simulator import simulate
from nodeserve.plan.summary import Summary, summarize
from nodeserve.plan.workloads import Workload, generate, parse_lengths
from nodeserve.policy.units import DispatchOptions
from tests.fakes.simulation import PASS_S, profile

NUM_REQUESTS, RATE = 6000, 1000.0  # six or more arrivals in every T/N
NUM_SEQS = 4096
NUM_INSTANCES = [1, 4, *(pytest.param(number, marks=pytest.mark.slow) for number in (2, 8))]


def run(num_instances: int, admission: str) -> Summary:
    one_token = parse_lengths("1")
    workload = Workload(RATE, NUM_REQUESTS, parse_lengths("16"), one_token, seed=2)
    scenario = Scenario(
        f"{num_instances}p1d",
        replace(profile(num_blocks=NUM_SEQS, max_num_seqs=NUM_SEQS), max_model_len=1024),
        DispatchOptions(admission, budget=10**6, max_num_seqs=NUM_SEQS),
        transit_s=0.0,
    )
    summary = summarize(simulate(scenario, generate(workload, 1024)), scenario)
    assert summary is not None and summary.outcomes == {"length": NUM_REQUESTS}
    return summary


def wait_s(summary: Summary) -> float:
    return summary.stages["scheduler_wait_s"].mean + summary.stages["device_wait_s"].mean


@pytest.mark.parametrize("num_instances", NUM_INSTANCES)
def test_dispatch_on_arrival_waits_half_a_pass(num_instances: int) -> None:
    summary = run(num_instances, "round-robin")
    assert wait_s(summary) == pytest.approx(PASS_S / 2, rel=0.02)
    assert summary.stages["scheduler_wait_s"].p99 == 0.0


@pytest.mark.parametrize("num_instances", NUM_INSTANCES)
def test_staggering_divides_the_wait_by_the_instances(num_instances: int) -> None:
    summary = run(num_instances, "staggered")
    assert wait_s(summary) == pytest.approx(PASS_S / (2 * num_instances), rel=0.02)
    assert summary.stages["device_wait_s"].p99 < 0.01 * PASS_S
    spread = summary.prefill.phase_spread if summary.prefill else None
    assert num_instances == 1 or spread == pytest.approx(1.0, abs=0.02)
