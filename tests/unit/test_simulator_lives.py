"""Random nodes, arrivals and faults: nothing is lost, done twice or starved; bit for bit again."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodeserve.plan.records import Arrival, Engine, Faults, Scenario
from nodeserve.plan.simulator import Simulation, simulate
from nodeserve.plan.workloads import Gaps, Lengths, Workload, generate
from nodeserve.policy.flow import FlowOptions
from nodeserve.policy.units import ADMISSIONS, DECODE_ALLOCATIONS, DispatchOptions
from nodeserve.types import Role
from tests.fakes.simulation import profile

NUM_BLOCKS = 40  # the longest request takes 19
LAYOUTS = ("1p1d", "2p:ep2,1d:ep2", "3p2d", "1p:ep3,2m", "2m:ep2", "1d,2p", "2p1m1d")

arrivals = st.lists(
    st.builds(
        Arrival,
        arrived_s=st.floats(0.0, 2.0),
        num_prompt_tokens=st.integers(1, 200),
        num_output_tokens=st.integers(1, 100),
        priority=st.integers(-1, 1),
        ttft_slo_s=st.none() | st.floats(0.01, 2.0),
    ),
    min_size=1,
    max_size=40,
)
dispatches = st.builds(
    DispatchOptions,
    admission=st.sampled_from(ADMISSIONS),
    window_s=st.none() | st.floats(0.0, 0.3),
    window_k=st.floats(0.0, 3.0),
    prefill_allocation=st.sampled_from(("water-filling", "round-robin")),
    budget=st.integers(8, 300),
    max_num_seqs=st.integers(1, 8),
)
scenarios = st.builds(
    Scenario,
    layout=st.sampled_from(LAYOUTS),
    profile=st.builds(
        lambda token_s, fix_s: profile(NUM_BLOCKS, token_s=token_s, prefill_fix_s=fix_s),
        st.floats(0.0, 1e-3),
        st.floats(1e-3, 0.2),
    ),
    dispatch=dispatches,
    decode_allocation=st.sampled_from(DECODE_ALLOCATIONS),
    flow=st.none()
    | st.builds(
        FlowOptions,
        max_num_queued_reqs=st.integers(1, 50),
        max_num_queued_tokens=st.integers(200, 5000),
        on_overload=st.sampled_from(("reject", "queue")),
    ),
    seed=st.integers(0, 3),
    noise=st.sampled_from((0.0, 0.2)),
    transit_s=st.sampled_from((0.0, 0.0025, 0.05)),
    faults=st.builds(
        Faults,
        report_loss=st.sampled_from((0.0, 0.1, 0.5, 1.0)),
        kill_instance=st.none() | st.just(0),
        kill_at_s=st.floats(0.0, 3.0),
    ),
    engine=st.builds(Engine, delay_passes=st.sampled_from((0, 30))),
)


def drain(simulation: Simulation) -> None:
    """Let the last releases arrive."""
    until_s = simulation.clock.now_s + 5.0
    while simulation.clock.now_s < until_s and simulation.turn():
        pass


@settings(max_examples=60, deadline=None)
@given(scenarios, arrivals)
def test_every_request_ends_once_and_gives_back_what_it_took(
    scenario: Scenario, requests: list[Arrival]
) -> None:
    simulation = Simulation(scenario, requests)
    outcome = simulation.run()
    drain(simulation)
    assert sorted(one.arrival.arrived_s for one in outcome.served) == sorted(
        one.arrived_s for one in requests
    )
    left = [one for one in simulation.instances if not one.lost]
    alone = not any(one.role is not Role.DECODE for one in left) or not any(
        one.role is not Role.PREFILL for one in left
    )
    fine = {
        "length",
        *({"overloaded"} if scenario.flow else ()),
        *({"worker_lost"} if alone else ()),
    }
    assert {one.outcome for one in outcome.served} <= fine
    for one in outcome.served:
        timings = one.timings
        stages = (timings.scheduler_wait_s, timings.transit_s, timings.device_wait_s)
        assert min(*stages, timings.prefill_s, timings.return_s, timings.decode_s) > -1e-9
        if one.outcome == "length":
            total_s = one.arrival.arrived_s + timings.ttft_s + timings.decode_s
            assert abs(total_s - one.ended_s) < 1e-9
    for instance in left:
        for rank in instance.ranks if instance.alive and not alone else ():
            rank.scheduler.check()
            assert not rank.held and rank.scheduler.blocks.num_free == NUM_BLOCKS


@settings(max_examples=60, deadline=None)
@given(scenarios, arrivals)
def test_without_faults_every_token_is_computed_once(
    scenario: Scenario, requests: list[Arrival]
) -> None:
    """But for what a preemption throws away."""
    outcome = simulate(replace(scenario, faults=Faults(), flow=None), requests)
    assert {one.outcome for one in outcome.served} == {"length"}
    works = [work for one in outcome.passes for work in one.ranks]
    if not any(one.timings.num_preemptions for one in outcome.served):
        assert sum(work.prefill_tokens for work in works) == sum(
            one.num_prompt_tokens for one in requests
        )
        assert sum(work.num_decodes for work in works) == sum(
            one.num_output_tokens - 1 for one in requests
        )
    ended: dict[int, float] = {}
    for one in outcome.passes:
        assert one.began_s >= ended.get(one.instance, 0.0) - 1e-9, "an instance runs one pass"
        ended[one.instance] = one.began_s + one.seconds


@pytest.mark.slow
def test_the_same_run_again_is_the_same_bit_for_bit() -> None:
    workload = Workload(
        40.0, 300, Lengths("lognormal", 900.0, 0.8), Lengths("lognormal", 30.0, 0.5), Gaps(3.0)
    )
    requests = generate(workload, 32_768)
    faults = Faults(report_loss=0.1, kill_instance=1, kill_at_s=2.0)
    for admission in ADMISSIONS:
        scenario = Scenario(
            "3p:ep4,1d:ep4", "moe-ep8", DispatchOptions(admission, budget=4096), faults=faults
        )
        assert repr(simulate(scenario, requests)) == repr(simulate(scenario, requests))
