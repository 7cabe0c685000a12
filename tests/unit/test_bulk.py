"""Decodes in bulk are those of the real scheduler: whole simulations, with one and the other."""

from dataclasses import replace
from random import Random
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodeserve.plan import bulk, instances
from nodeserve.plan.records import Arrival, Faults, Outcome, Scenario
from nodeserve.plan.simulator import Simulation, simulate
from nodeserve.policy.batching import Sequence
from nodeserve.policy.cost import StepCost
from nodeserve.policy.flow import FlowOptions
from nodeserve.policy.profile import Profile
from nodeserve.policy.scheduler import Scheduler
from nodeserve.policy.units import DispatchOptions

SMALL = Profile(
    name="small",
    source="a test",
    cost=StepCost(0.010, 0.010, 1e-4, 1e-8, 1e-4, 1e-6),
    noise=0.05,
    num_kv_tokens=640,
    kv_bytes_per_token=1000,
    handoff_bytes_per_s=1e8,
    max_num_batched_tokens=64,
    max_num_seqs=16,
    max_model_len=600,
)
LAYOUTS = ("1m", "2m", "1p1d", "1p,1m", "2p2d")


class Real(Scheduler):
    """With what simulated ranks ask for besides."""

    def num_tokens(self, sequence: Sequence) -> int:
        return len(sequence.token_ids)

    @property
    def has_idle_work(self) -> bool:
        return self.has_prompts or any(not one.num_launched for one in self._running)


def served(scenario: Scenario, arrivals: list[Arrival]) -> str:
    outcome: Outcome = simulate(scenario, arrivals)
    return repr((outcome.served, outcome.passes, outcome.duration_s))


def with_real(scenario: Scenario, arrivals: list[Arrival]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instances, "BulkScheduler", Real)
        return served(scenario, arrivals)


def node(layout: str, num_kv_tokens: int, seed: int) -> Scenario:
    return Scenario(
        layout,
        replace(SMALL, num_kv_tokens=num_kv_tokens),
        dispatch=DispatchOptions(budget=64, max_num_seqs=16),
        seed=seed,
    )


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    num_kv_tokens=st.sampled_from((640, 1600, 16_000)),
    seed=st.integers(0, 100),
    kill_at_s=st.none() | st.floats(0.0, 4.0),
    requests=st.lists(
        st.tuples(st.floats(0.0, 3.0), st.integers(1, 300), st.integers(1, 250)), max_size=25
    ),
)
def test_simulations_are_the_same_bit_for_bit(
    layout: str,
    num_kv_tokens: int,
    seed: int,
    kill_at_s: float | None,
    requests: list[tuple[float, int, int]],
) -> None:
    """Also where an instance dies, and what it decoded goes on elsewhere with the tokens it has."""
    arrivals = [Arrival(*one) for one in sorted(requests)]
    scenario = node(layout, num_kv_tokens, seed)
    if kill_at_s is not None:
        last = len(scenario.instances) - 1
        scenario = replace(scenario, faults=Faults(kill_instance=last, kill_at_s=kill_at_s))
    assert served(scenario, arrivals) == with_real(scenario, arrivals)


def test_shortage_of_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sequences are preempted, which the real scheduler then plans."""
    arrivals = [Arrival(0.05 * place, 40 + place, 200) for place in range(12)]
    scenario = node("1m", 640, 3)
    num_ended = 0
    end_bulk = bulk.BulkScheduler._end_bulk

    def counted(self: bulk.BulkScheduler) -> None:
        nonlocal num_ended
        num_ended += 1
        end_bulk(self)

    monkeypatch.setattr(bulk.BulkScheduler, "_end_bulk", counted)
    outcome = simulate(scenario, arrivals)
    assert num_ended > 0  # and begun again
    assert sum(one.timings.num_preemptions for one in outcome.served) > 0
    assert served(scenario, arrivals) == with_real(scenario, arrivals)


@pytest.mark.parametrize("layout", ["1m", "1p1d", "2m"])
def test_stages_take_as_long_as_with_the_real_scheduler(layout: str) -> None:
    """Which sequences are in a pass together differs: in bulk they are dealt out once."""
    in_bulk, real = staged_runs(layout, 16_000)
    assert in_bulk.duration_s == pytest.approx(real.duration_s, rel=0.01)
    for mean in (mean_ttft_s, mean_tpot_s):
        assert mean(in_bulk) == pytest.approx(mean(real), rel=0.02)


def test_stages_that_are_short_of_blocks_preempt_and_go_on() -> None:
    """Not the same sequences: who is in a pass together decides who finds no block."""
    in_bulk, real = staged_runs("1m", 1200)
    assert {one.outcome for one in in_bulk.served} == {"length"}
    preempted = [sum(one.timings.num_preemptions for one in run.served) for run in (in_bulk, real)]
    assert preempted[0] > 10 and preempted[1] > 10
    assert in_bulk.duration_s == pytest.approx(real.duration_s, rel=0.05)


def staged_runs(layout: str, num_kv_tokens: int) -> tuple[Outcome, Outcome]:
    """With three stages: in bulk, and with the real scheduler."""
    random = Random(layout)
    times = sorted(random.uniform(0.0, 6.0) for _ in range(60))
    arrivals = [Arrival(at_s, random.randint(1, 200), random.randint(1, 150)) for at_s in times]
    scenario = node(layout, num_kv_tokens, 5)
    profile = replace(scenario.resolved_profile, num_stages=3, noise=0.0)
    scenario = replace(scenario, profile=profile)
    in_bulk = simulate(scenario, arrivals)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instances, "BulkScheduler", Real)
        return in_bulk, simulate(scenario, arrivals)


def mean_ttft_s(outcome: Outcome) -> float:
    return fmean(one.timings.ttft_s for one in outcome.served)


def mean_tpot_s(outcome: Outcome) -> float:
    return fmean(one.tpot_s for one in outcome.served if one.tpot_s is not None)


@pytest.mark.parametrize("layout", ["1m", "3m", "1p1d", "2p2d", "1p,2m", "1p:ep2,1d:ep2"])
@pytest.mark.parametrize("admission", ["staggered", "shortest-queue"])
def test_quiet_passes_are_those_that_take_a_turn_each(
    layout: str, admission: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits, is refused or parked meanwhile: passes in which nobody ends decide nothing."""
    random = Random(layout + admission)
    times = [random.uniform(0.0, 4.0) for _ in range(60)]
    arrivals = [
        Arrival(time_s, random.randint(1, 300), random.randint(1, 200), 0, 0.5, 0.03)
        for time_s in sorted(times)
    ]
    scenario = replace(
        node(layout, 3200, 1),
        dispatch=DispatchOptions(admission, budget=64, max_num_seqs=16),
        flow=FlowOptions(64, 1 << 16),
    )
    num_turns = 0
    turn = Simulation.turn

    def counted(self: Simulation) -> bool:
        nonlocal num_turns
        num_turns += 1
        return turn(self)

    monkeypatch.setattr(Simulation, "turn", counted)
    quick, num_quick = of_passes(simulate(scenario, arrivals)), num_turns
    monkeypatch.setattr(bulk.BulkBatch, "is_quiet", False)
    assert quick == of_passes(simulate(scenario, arrivals))
    assert num_quick < 0.7 * (num_turns - num_quick)


def of_passes(outcome: Outcome) -> str:
    """A run; passes of different instances that end together may be told in either order."""
    passes = sorted(outcome.passes, key=lambda one: (one.began_s + one.seconds, one.instance))
    return repr((outcome.served, passes, outcome.duration_s))
