"""The discrete-event simulator: times that can be reckoned by hand, and ends of every kind."""

import pytest

from nodeserve.errors import ConfigError
from nodeserve.plan.records import Arrival, Engine, Faults, Outcome
from nodeserve.plan.simulator import Simulation, simulate
from nodeserve.plan.supervisor import HEARTBEAT_S, NUM_PROBES, PROBE_TIMEOUT_S
from nodeserve.policy.cost import IDLE
from nodeserve.policy.flow import FlowOptions
from nodeserve.policy.prefill_instance import MIN_DEADLINE_S
from nodeserve.policy.units import DispatchOptions, Waiting
from tests.fakes.simulation import PASS_S, STEP_S, TRANSIT_S, profile, scenario

ROUND_ROBIN = DispatchOptions("round-robin", budget=4096)
HEARD_S = 2 * TRANSIT_S


def at_once(num: int, num_prompt: int = 32, num_output: int = 1) -> list[Arrival]:
    return [Arrival(1.0, num_prompt, num_output)] * num


def outcomes(outcome: Outcome) -> set[str]:
    return {one.outcome for one in outcome.served}


# ---- one request, stage by stage


def test_the_stages_of_a_request_alone() -> None:
    (served,) = simulate(scenario("1p1d"), [Arrival(1.0, 32, 5)]).served
    timings = served.timings
    pull_s = 32 * 1000 / 1e6
    expected = {
        "scheduler_wait_s": 0.0,
        "transit_s": TRANSIT_S,
        "device_wait_s": 0.0,
        "prefill_s": PASS_S,
        "return_s": TRANSIT_S,
        "handoff_wait_s": 0.0,
        "handoff_s": pull_s,
        "decode_s": TRANSIT_S + pull_s + 4 * STEP_S + TRANSIT_S,
    }
    for name, seconds in expected.items():
        assert getattr(timings, name) == pytest.approx(seconds), name
    assert timings.ttft_s == pytest.approx(HEARD_S + PASS_S)
    assert served.ended_s == pytest.approx(1.0 + timings.ttft_s + timings.decode_s)
    assert served.tpot_s == pytest.approx(timings.decode_s / 4)
    assert (served.outcome, timings.handoff_bytes) == ("length", 32_000)
    assert (timings.prefill_worker, timings.decode_worker) == (0, 1)


def test_on_a_mixed_worker_nothing_is_handed_over() -> None:
    outcome = simulate(scenario("1m"), [Arrival(1.0, 32, 5)])
    (served,) = outcome.served
    assert served.timings.handoff_bytes == 0
    assert served.timings.decode_s == pytest.approx(4 * STEP_S)
    assert [one.ranks[0].num_decodes for one in outcome.passes] == [0, 1, 1, 1, 1]


def test_one_token_ends_where_it_was_prefilled() -> None:
    (served,) = simulate(scenario("1p1d"), at_once(1)).served
    assert served.tpot_s is None and served.timings.decode_worker == -1
    assert served.ended_s == pytest.approx(1.0 + served.timings.ttft_s)


def test_what_arrives_in_a_pass_waits_for_its_end() -> None:
    dispatch = ROUND_ROBIN
    arrivals = [Arrival(1.0, 32, 1), Arrival(1.03, 32, 1)]
    first, second = simulate(scenario("1p1d", dispatch=dispatch), arrivals).served
    assert first.timings.device_wait_s == 0.0
    assert second.timings.device_wait_s == pytest.approx(PASS_S - 0.03)


def test_a_long_prompt_takes_several_passes() -> None:
    dispatch = DispatchOptions("round-robin", budget=300)
    outcome = simulate(scenario("1p1d", dispatch=dispatch), at_once(1, num_prompt=1000))
    assert [one.ranks[0].prefill_tokens for one in outcome.passes] == [300, 300, 300, 100]
    assert outcome.served[0].timings.prefill_s == pytest.approx(4 * PASS_S)


# ---- ranks in lockstep


def test_ranks_run_their_passes_together() -> None:
    cost = profile(token_s=1e-3)
    lengths = [100, 20, 50]
    outcome = simulate(
        scenario("1p:ep4,1d", profile=cost, dispatch=ROUND_ROBIN),
        [Arrival(1.0, num_tokens, 1) for num_tokens in lengths],
    )
    (one,) = outcome.passes
    assert sorted(work.prefill_tokens for work in one.ranks) == [0, 20, 50, 100]
    assert IDLE in one.ranks
    assert one.seconds == pytest.approx(PASS_S + 0.1)  # the longest prompt's
    for served in outcome.served:
        assert served.timings.prefill_s == pytest.approx(one.seconds)


def test_noise_is_seeded_and_about_one() -> None:
    arrivals = [Arrival(float(i), 32, 1) for i in range(400)]

    def seconds(seed: int) -> list[float]:
        outcome = simulate(scenario("1p1d", noise=0.1, seed=seed), arrivals)
        return [one.seconds for one in outcome.passes]

    assert seconds(1) == seconds(1) != seconds(2)
    assert sum(seconds(1)) / 400 == pytest.approx(PASS_S, rel=0.02)
    assert 0.5 * PASS_S <= min(seconds(1)) < 0.95 * PASS_S


def test_an_engine_may_hold_a_pass_back() -> None:
    engine = Engine(delay_passes=30, delay_tick_s=0.005)
    node = scenario("1p:ep2,1d", dispatch=ROUND_ROBIN, engine=engine)
    alone = simulate(node, at_once(1))
    assert alone.served[0].timings.device_wait_s == pytest.approx(0.15)
    pair = simulate(node, [Arrival(1.0, 32, 1), Arrival(1.04, 32, 1)])
    assert pair.served[0].timings.device_wait_s == pytest.approx(0.04)  # all ranks have work
    assert len(pair.passes) == 1


# ---- memory


def test_pages_wait_for_room_on_the_decode_side() -> None:
    """Two at a time fit: 160 tokens of prompt are ten blocks, and five more come."""
    small = profile(num_blocks=32)
    outcome = simulate(scenario("1p1d", profile=small), at_once(6, num_prompt=160, num_output=60))
    assert outcomes(outcome) == {"length"}
    assert max(one.ranks[0].num_decodes for one in outcome.passes) <= 3
    assert max(one.timings.handoff_wait_s for one in outcome.served) > 60 * STEP_S


def test_decode_allocation_learns_growth_and_knows_the_blocks() -> None:
    node = scenario("1p1d", profile=profile(), block_size=32)
    simulation = Simulation(node, [Arrival(0.1 * place, 100, 100) for place in range(30)])
    allocator = simulation.handoffs.allocator
    assert allocator.block_size == 32
    simulation.run()
    assert allocator.growth_share > 0.75, "all took what they may"


def test_best_effort_stays_so_when_a_request_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = FlowOptions(100, 100_000, "queue")
    arrivals = [Arrival(0.0, 32, 1)] * 2 + [Arrival(0.15, 32, 1, ttft_slo_s=0.01)] * 4
    faults = Faults(kill_instance=0, kill_at_s=0.2)
    node = scenario("2p1d", dispatch=ROUND_ROBIN, flow=flow, faults=faults)
    simulation = Simulation(node, arrivals)
    pushed: dict[int, list[bool]] = {}
    push = simulation.dispatcher.push

    def spy(waiting: Waiting, now_s: float) -> None:
        pushed.setdefault(waiting.request_id, []).append(waiting.best_effort)
        push(waiting, now_s)

    monkeypatch.setattr(simulation.dispatcher, "push", spy)
    simulation.run()
    again = [kinds for kinds in pushed.values() if len(kinds) > 1]
    assert again and all(set(kinds) == {True} for kinds in again)


def test_a_preempted_request_comes_back_with_its_tokens() -> None:
    small = profile(num_blocks=24)
    outcome = simulate(scenario("1m", profile=small), at_once(4, num_prompt=64, num_output=150))
    assert outcomes(outcome) == {"length"}
    num_preemptions = sum(one.timings.num_preemptions for one in outcome.served)
    assert num_preemptions >= 1
    # Computing all its tokens again gives the next one, so that is one decode less.
    num_decodes = sum(one.ranks[0].num_decodes for one in outcome.passes)
    assert num_decodes == 4 * 149 - num_preemptions


def test_who_only_counts_requests_does_not_keep_passes() -> None:
    arrivals = at_once(4, num_output=20)
    simulation = Simulation(scenario("1p1d"), arrivals, keeps_passes=False)
    outcome = simulation.run()
    assert outcome.passes == []
    kept = simulate(scenario("1p1d"), arrivals)
    assert kept.passes and outcome.served == kept.served


# ---- refusals


def test_what_can_never_fit_is_refused() -> None:
    arrivals = [Arrival(0.0, 4096, 1), Arrival(0.0, 600, 600), Arrival(0.0, 32, 1)]
    outcome = simulate(scenario("1p1d", profile=profile(num_blocks=64)), arrivals)
    assert [one.outcome for one in outcome.served] == [
        "prompt_too_long",
        "out_of_blocks",
        "length",
    ]


def test_a_full_buffer_refuses() -> None:
    flow = FlowOptions(max_num_queued_reqs=2, max_num_queued_tokens=10**6)
    dispatch = DispatchOptions("pull", budget=256)
    arrivals = [Arrival(0.001 * i, 256, 1) for i in range(12)]
    outcome = simulate(scenario("1p1d", flow=flow, dispatch=dispatch), arrivals)
    assert outcomes(outcome) == {"length", "overloaded"}
    refused = [one for one in outcome.served if one.outcome == "overloaded"]
    assert all(one.ended_s == one.arrival.arrived_s for one in refused)


# ---- what goes wrong


def test_a_killed_instance_gives_its_requests_to_the_other() -> None:
    faults = Faults(kill_instance=0, kill_at_s=1.05)
    arrivals = [Arrival(1.0 + 0.001 * i, 32, 3) for i in range(8)]
    node = scenario("2p1d", faults=faults, dispatch=ROUND_ROBIN)
    outcome = simulate(node, arrivals)
    assert outcomes(outcome) == {"length"}
    again = [one for one in outcome.served if one.timings.num_preemptions]
    assert len(again) == 4
    assert {one.timings.prefill_worker for one in again} == {1}
    longest_s = max(one.timings.ttft_s for one in again)
    assert longest_s < HEARTBEAT_S + 2 * PASS_S + 2 * HEARD_S


def test_probes_find_a_death_out_before_the_heartbeat_does() -> None:
    faults = Faults(kill_instance=0, kill_at_s=1.05)
    before = [Arrival(0.2 * i, 32, 1) for i in range(4)]
    outcome = simulate(scenario("2p1d", faults=faults), before + at_once(8))
    assert outcomes(outcome) == {"length"}
    again = [one for one in outcome.served if one.timings.num_preemptions]
    assert again
    found_out_s = MIN_DEADLINE_S + NUM_PROBES * PROBE_TIMEOUT_S
    assert max(one.timings.ttft_s for one in again) < found_out_s + 3 * PASS_S < HEARTBEAT_S


def test_a_killed_decoder_gives_its_requests_back_with_their_tokens() -> None:
    faults = Faults(kill_instance=1, kill_at_s=1.5)
    outcome = simulate(scenario("1p2d", faults=faults), at_once(8, num_output=100))
    assert outcomes(outcome) == {"length"}
    again = [one for one in outcome.served if one.timings.num_preemptions]
    assert len(again) == 4
    assert {one.timings.decode_worker for one in again} == {2}
    decoded = sum(one.ranks[0].num_decodes for one in outcome.passes)
    assert decoded < 8 * 99  # what the dead one had done was not done again


def test_without_anybody_to_prefill_the_node_ends() -> None:
    faults = Faults(kill_instance=0, kill_at_s=1.05)
    arrivals = [Arrival(float(i), 32, 3) for i in range(40)]
    outcome = simulate(scenario("1p1d", faults=faults), arrivals)
    assert [one.outcome for one in outcome.served] == ["length"] + 39 * ["worker_lost"]


def test_lost_reports_lose_no_request() -> None:
    faults = Faults(report_loss=0.5)
    arrivals = [Arrival(0.02 * i, 400, 1) for i in range(400)]
    outcome = simulate(scenario("2p:ep2,1d:ep2", faults=faults), arrivals)
    assert outcomes(outcome) == {"length"}
    assert max(one.timings.ttft_s for one in outcome.served) < 2.0


def test_times_of_supervision_leave_room_for_a_probe() -> None:
    assert NUM_PROBES * PROBE_TIMEOUT_S < HEARTBEAT_S


# ---- settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layout": "1p:tp2,1d"}, "epN"),
        ({"layout": "4p"}, "nobody for decode"),
        ({"profile": "none"}, "no profile 'none'"),
        ({"transit_s": 0.1}, "transit of 0.1 s"),
        ({"transit_s": -1.0}, "transit of -1 s"),
        ({"faults": Faults(kill_instance=2)}, "no instance 2 to kill"),
        ({"dispatch": DispatchOptions(budget=16)}, "max-num-batched-tokens"),
    ],
)
def test_a_scenario_that_cannot_be(changes: dict[str, object], words: str) -> None:
    layout = str(changes.pop("layout", "1p1d"))
    with pytest.raises(ConfigError, match=words):
        simulate(scenario(layout, **changes), at_once(1))


def test_no_arrivals_are_an_empty_run() -> None:
    assert simulate(scenario("1p1d"), []) == Outcome([], [], 0.0)
