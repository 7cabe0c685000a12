"""Simulated instances with tensor and pipeline parallelism, and the prefill-first baseline."""

from array import array
from dataclasses import replace
from statistics import fmean

import pytest

from nodeserve.errors import ConfigError
from nodeserve.plan.instances import build_instances
from nodeserve.plan.records import Arrival, Engine, Faults, Outcome, Scenario
from nodeserve.plan.simulator import simulate
from nodeserve.policy.batching import Sequence as Tokens
from nodeserve.policy.pipeline import Pipeline
from nodeserve.policy.profile import Family
from nodeserve.policy.profiles import find_profile
from nodeserve.policy.units import DispatchOptions
from nodeserve.types import Sampling
from tests.fakes.simulation import PASS_S, STEP_S, TRANSIT_S, profile, scenario

HEARD_S = 2 * TRANSIT_S
AT_ONCE = DispatchOptions("shortest-queue", budget=4096)
TIGHT = DispatchOptions("shortest-queue", budget=256)


def family(*shapes: tuple[int, int], **changes: int) -> Family:
    return Family(
        "test", "a test", {(tp, pp): profile(num_stages=pp, **changes) for tp, pp in shapes}
    )


def ttfts(outcome: Outcome) -> list[float]:
    return [one.timings.ttft_s - HEARD_S for one in outcome.served]


def test_passes_overlap_in_stages() -> None:
    pipeline = Pipeline(2)
    assert pipeline.run(0.0, 1.0) == 1.0
    assert pipeline.opens_s == 0.5
    assert pipeline.run(0.5, 1.0) == 1.5
    # A short pass behind a long one waits at each stage; a long one behind it does not.
    assert pipeline.run(1.0, 0.2) == pytest.approx(1.6)
    assert pipeline.opens_s == pytest.approx(1.1)
    assert pipeline.run(2.0, 1.0) == 3.0


def test_prompts_follow_each_other_through_stages() -> None:
    """One has the whole pass to wait; of four that come together each is a stage later."""
    made = scenario("1p:pp2,1d", profile=family((1, 1), (1, 2)), dispatch=AT_ONCE)
    assert ttfts(simulate(made, [Arrival(1.0, 32, 1)])) == pytest.approx([PASS_S])
    made = scenario("1p:pp2,1d", profile=family((1, 1), (1, 2)), dispatch=TIGHT)
    waits = sorted(ttfts(simulate(made, [Arrival(1.0, 256, 1)] * 4)))
    assert waits == pytest.approx([PASS_S, 1.5 * PASS_S, 2 * PASS_S, 2.5 * PASS_S])


def test_stages_decode_a_batch_each() -> None:
    """A sequence takes as long as without stages; two of them twice as many tokens a second."""
    made = scenario("1p,1d:pp2", profile=family((1, 1), (1, 2)), dispatch=AT_ONCE)
    outcome = simulate(made, [Arrival(1.0, 32, 101)] * 2)
    assert [one.tpot_s for one in outcome.served] == pytest.approx([STEP_S] * 2, rel=0.1)
    decodes = [one for one in outcome.passes if one.instance > 0]
    assert {one.instance for one in decodes} == {1} and len(decodes) == 200
    assert all(one.ranks[0].num_decodes == 1 for one in decodes)
    busy_s = [one.seconds for one in decodes[10:-10]]
    assert busy_s == pytest.approx([STEP_S / 2] * len(busy_s), rel=0.1), "one of two is over"


def test_chunks_of_one_prompt_follow_each_other_through_stages() -> None:
    """A prompt of four chunks is through two stages after five turns of half a pass, not eight."""
    made = scenario("1p:pp2,1d", profile=family((1, 1), (1, 2)), dispatch=TIGHT)
    outcome = simulate(made, [Arrival(1.0, 1024, 1)])
    assert ttfts(outcome) == pytest.approx([2.5 * PASS_S])
    assert [one.ranks[0].prefill_tokens for one in outcome.passes] == [256] * 4


@pytest.mark.parametrize("admission", ["staggered", "pull"])
def test_stages_are_kept_busy_by_departures(admission: str) -> None:
    """A pass must not be over before the next one departs: the other stage would have nothing."""
    dispatch = DispatchOptions(admission, budget=256)
    made = scenario("1p:pp2,1d", profile=family((1, 1), (1, 2)), dispatch=dispatch)
    outcome = simulate(made, [Arrival(1.0 + 0.5 * PASS_S * one, 256, 1) for one in range(40)])
    assert outcome.duration_s - 1.0 == pytest.approx(40 * 0.5 * PASS_S, rel=0.1)


def test_departures_fill_chunks_as_well_as_dispatch_on_arrival_does() -> None:
    """Prompts that do not fit a pass evenly, as many as the stages can take."""
    means = {}
    for admission in ("staggered", "shortest-queue"):
        dispatch = DispatchOptions(admission, budget=256)
        made = scenario("1p:pp4,1d", profile=family((1, 1), (1, 4)), dispatch=dispatch)
        arrivals = [Arrival(1.0 + 0.022 * one, 30 + 41 * one % 400, 1) for one in range(200)]
        means[admission] = fmean(ttfts(simulate(made, arrivals)))
    assert means["staggered"] < 1.02 * means["shortest-queue"]


def test_stages_that_are_busy_are_not_asked_again_and_again() -> None:
    [made] = build_instances(scenario("1m:pp3", profile=family((1, 3)), dispatch=TIGHT))
    for request_id in range(3):
        tokens = Tokens(request_id, array("i", [0] * 256), 256, Sampling(max_tokens=4))
        made.ranks[0].submit(tokens)
    stage_s = PASS_S / 3
    begun = [made.begin(at_s) for at_s in (0.0, 0.01, 0.02, stage_s, 2 * stage_s, 3 * stage_s)]
    assert begun[2] is None  # it looks again already
    assert begun[5] is None  # three are under way
    told = [one for one in begun if one is not None]
    assert [runs for _, runs in told] == [True, False, True, True]
    ends = [PASS_S, stage_s, stage_s + PASS_S, 2 * stage_s + PASS_S]
    assert [when_s for when_s, _ in told] == pytest.approx(ends)
    assert [made.end().step for _ in range(3)] == [1, 2, 3]


def test_each_group_has_the_memory_of_its_shape() -> None:
    shapes = {(1, 1): profile(num_blocks=64), (2, 1): profile(num_blocks=256)}
    made = scenario("1p,1d:tp2", profile=Family("test", "", shapes), dispatch=AT_ONCE)
    assert simulate(made, [Arrival(0.0, 1000, 1500)]).served[0].outcome == "length"
    turned = scenario("1p:tp2,1d", profile=Family("test", "", shapes), dispatch=AT_ONCE)
    assert simulate(turned, [Arrival(0.0, 1000, 1500)]).served[0].outcome == "out_of_blocks"
    assert simulate(made, [Arrival(0.0, 1100, 10)]).served[0].outcome == "out_of_blocks"


def test_a_handoff_is_as_fast_as_its_slower_side() -> None:
    fast = replace(profile(), handoff_bytes_per_s=1e9)
    slow = profile()  # 1e6 bytes a second
    shapes = {(1, 1): slow, (2, 1): fast}
    made = scenario("1p,1d:tp2", profile=Family("test", "", shapes), dispatch=AT_ONCE)
    [served] = simulate(made, [Arrival(0.0, 32, 5)]).served
    assert served.timings.handoff_s == pytest.approx(32 * 1000 / 1e6)


def test_a_shape_without_a_family_is_refused() -> None:
    with pytest.raises(ConfigError, match="epN"):
        simulate(scenario("1m:tp2"), [Arrival(0.0, 32, 1)])
    with pytest.raises(ConfigError, match=r"no tp3\.pp1.*tp1\.pp1, tp2\.pp1"):
        Scenario("1m:tp3", family((1, 1), (2, 1))).instances  # noqa: B018
    with pytest.raises(ConfigError, match="opt-66b-a100"):
        find_profile("opt-67b")


def test_prefill_first_stops_decodes_for_prompts() -> None:
    """A prompt that comes while another request decodes: chunked, it shares a pass with it;
    prefill-first, the decode waits for that pass."""
    arrivals = [Arrival(0.0, 32, 50), Arrival(0.3, 32, 2)]
    ours = simulate(scenario("1m", dispatch=AT_ONCE), arrivals)
    first = simulate(scenario("1m", dispatch=AT_ONCE, engine=Engine(prefill_first=True)), arrivals)
    mixed = [work for one in ours.passes for work in one.ranks]
    apart = [work for one in first.passes for work in one.ranks]
    assert any(work.prefill_tokens and work.num_decodes for work in mixed)
    assert not any(work.prefill_tokens and work.num_decodes for work in apart)
    assert len(apart) == len(mixed) + 1
    assert first.served[0].ended_s == pytest.approx(ours.served[0].ended_s + STEP_S)


@pytest.mark.parametrize(
    ("layout", "victim", "killed_s"), [("2p:pp2,1d", 0, 1.22), ("1p,2d:pp3", 1, 1.6)]
)
def test_a_killed_instance_falls_silent_in_all_its_stages(
    layout: str, victim: int, killed_s: float
) -> None:
    """Its requests go to the other, also those of the passes that were under way."""
    made = scenario(
        layout,
        profile=family((1, 1), (1, 2), (1, 3)),
        dispatch=AT_ONCE,
        faults=Faults(kill_instance=victim, kill_at_s=killed_s),
    )
    arrivals = [Arrival(1.0 + 0.02 * number, 32, 60) for number in range(12)]
    outcome = simulate(made, arrivals)
    assert {one.outcome for one in outcome.served} == {"length"}
    assert any(one.timings.num_preemptions for one in outcome.served)
    of_it = [one for one in outcome.passes if one.instance == victim]
    assert max(one.began_s for one in of_it) <= killed_s
    assert max(one.began_s for one in outcome.passes) > killed_s + 1.0


def test_instances_are_killed_by_their_place_in_the_layout() -> None:
    made = scenario("1p:pp2,1d", profile=family((1, 1), (1, 2)), dispatch=AT_ONCE)
    with pytest.raises(ConfigError, match="no instance 2 to kill: the layout has 2"):
        simulate(replace(made, faults=Faults(kill_instance=2)), [Arrival(0.0, 32, 1)])
    outcome = simulate(replace(made, faults=Faults(kill_instance=1)), [Arrival(9.0, 32, 5)])
    assert outcome.served[0].outcome == "worker_lost"
