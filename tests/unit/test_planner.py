"""The search on cost models so plain that the answer is known beforehand."""

import shlex
from dataclasses import fields, replace

import pytest

from nodeserve.cli.launch import start
from nodeserve.config import EngineConfig
from nodeserve.coordinator.placement import check_numbers, choose_budget
from nodeserve.coordinator.places import choose_layout
from nodeserve.errors import ConfigError
from nodeserve.layout import Shape, parse_layout
from nodeserve.plan.affinity import Phase, best_pair, phase_alone, place
from nodeserve.plan.bounds import Demand, bound, capacity, demand_of, sides
from nodeserve.plan.candidates import (
    Candidate,
    kinds_of,
)
from nodeserve.plan.efforts import Effort
from nodeserve.plan.estimates import Estimator, in_turn
from nodeserve.plan.evaluate import Question, count
from nodeserve.plan.goodput import Slo
from nodeserve.plan.planner import Report, plan
from nodeserve.plan.pool import searching
from nodeserve.plan.requests import Source
from nodeserve.plan.verdict import Named, start_command, verdict
from nodeserve.policy.cost import StepCost
from nodeserve.policy.profile import Family, Profile
from nodeserve.types import Role

FAST = Effort(40, 100, 200, 1, 0.1, 1)
TINY = Effort(30, 60, 120, 1, 0.2, 1)
# One prompt token takes 0.1 ms, a pass 10 ms beside it, and sequences decode almost for nothing.
PLAIN = Profile(
    name="plain",
    source="a test",
    cost=StepCost(0.010, 0.010, 1e-4, 0.0, 1e-5, 0.0),
    noise=0.0,
    num_kv_tokens=100_000,
    kv_bytes_per_token=1000,
    handoff_bytes_per_s=1e10,
    max_num_batched_tokens=1024,
    max_num_seqs=64,
    max_model_len=4096,
)
LOOSE = Slo(1.0, 1.0)
# The same, but a pass with any prompt in it takes 100 ms: nobody can decode beside that.
CLUMSY = replace(PLAIN, name="clumsy", cost=replace(PLAIN.cost, prefill_fix_s=0.100))
FAMILY = Family(
    "family",
    "a test",
    {
        (1, 1): PLAIN,
        (2, 1): replace(PLAIN, num_gpus=2, cost=replace(PLAIN.cost, token_s=6e-5)),
        (2, 2): replace(PLAIN, num_gpus=4, num_stages=2),
        (8, 1): replace(PLAIN, num_gpus=8),
    },
)


def question(
    model: Profile | Family = PLAIN,
    workload: str = "synthetic(500,8)",
    slo: Slo = LOOSE,
    num_gpus: int = 2,
) -> Question:
    return Question(model, Source(workload), slo, num_gpus)


def goodput_of(asked: Question, layout: str) -> float:
    return Estimator(asked, FAST).alone(Candidate(layout, 1024)).goodput


# ---- answers that are known


@pytest.mark.slow
def test_where_nothing_is_gained_by_it_phases_are_not_taken_apart() -> None:
    """Decoding is next to free and its limit loose: an instance for it alone is wasted."""
    report = plan(question(), TINY)
    said = verdict(report)
    assert report.best is not None
    assert report.best.candidate.layout == "2m"
    assert said.disaggregate is False
    assert said.reason.startswith("do not disaggregate: 2m serves")


@pytest.mark.slow
def test_where_prompts_hold_up_decoding_phases_are_taken_apart() -> None:
    """Eight tokens at 10 ms, a limit of 20 ms: one prompt beside them is too much."""
    report = plan(question(CLUMSY, "synthetic(200,8)", Slo(1.0, 0.020)), TINY)
    said = verdict(report)
    assert report.best is not None
    assert report.best.candidate.layout == "1p1d"
    assert said.disaggregate is True
    mixed = report.best_of("mixed")
    assert mixed is not None and mixed.goodput < report.best.goodput / 2
    assert said.misses is not None and next(iter(said.misses)) == "tpot"
    assert "tokens are slow" in said.reason


@pytest.mark.slow
def test_prefill_gets_as_many_instances_as_it_needs() -> None:
    """Prompts of 2,000 tokens with two tokens to write: 3p1d beats 2p2d by half."""
    asked = question(workload="synthetic(2000,2)", slo=Slo(2.0, 0.1), num_gpus=4)
    three, two = goodput_of(asked, "3p1d"), goodput_of(asked, "2p2d")
    assert three > 1.3 * two > 0.0
    report = plan(asked, TINY)
    splits = [one for one in report.ranked if one.candidate.layout in ("3p1d", "2p2d")]
    assert splits[0].candidate.layout == "3p1d"


def test_a_prefill_instance_serves_what_its_passes_allow() -> None:
    """500 tokens take 60 ms alone, 2 prompts a pass 110 ms: at most 18 a second, and with 300 ms
    most of that."""
    asked = question(workload="synthetic(500,1)", slo=Slo(0.3, None))
    estimator = Estimator(asked, replace(FAST, fine_requests=1000, most_requests=1000))
    assert 12.0 < estimator.alone(Candidate("1m", 1024)).goodput <= 18.0


def test_limits_that_nobody_meets_are_said_to_be_so() -> None:
    report = plan(question(slo=Slo(0.05, 1.0)), FAST)  # 500 tokens take 60 ms
    assert report.best is None
    assert report.num_impossible == report.num_candidates
    assert "loosen the limits" in verdict(report).reason


# ---- the search


def summary(report: Report) -> list[tuple[str, int, float, float]]:
    return [
        (one.candidate.layout, one.candidate.max_num_batched_tokens, one.goodput, one.low)
        for one in report.ranked
    ]


@pytest.mark.slow
def test_the_same_question_has_the_same_answer() -> None:
    asked = question(workload="synthetic(lognormal:500,8)")
    first = summary(plan(asked, TINY))
    assert summary(plan(asked, TINY)) == first
    other = replace(asked, traffic=Source("synthetic(lognormal:500,8)", seed=1))
    assert summary(plan(other, TINY)) != first


@pytest.mark.slow
def test_the_number_of_processes_does_not_change_the_plan() -> None:
    asked = question(workload="synthetic(lognormal:500,8)")
    with searching(2) as run:
        assert summary(plan(asked, TINY, run)) == summary(plan(asked, TINY, in_turn))


def test_estimates_lie_within_their_ranges_and_bounds() -> None:
    report = plan(question(workload="synthetic(lognormal:500,8)", slo=Slo(0.5, 0.05)), TINY)
    assert report.ranked
    for one in report.ranked:
        assert one.low <= one.goodput <= one.most
        assert one.high is None or one.goodput <= one.high
    assert [one.goodput for one in report.ranked] == sorted(
        (one.goodput for one in report.ranked), reverse=True
    )


def test_candidates_see_the_same_requests() -> None:
    asked = question(workload="synthetic(lognormal:500,lognormal:50)")
    slow, fast = asked.requests(1.0, 50), asked.requests(4.0, 50)
    assert [one[1:3] for one in slow] == [one[1:3] for one in fast]
    assert slow[-1].arrived_s == pytest.approx(4 * fast[-1].arrived_s)


def test_refused_requests_are_misses() -> None:
    """Ten times what it can serve: almost all are refused, and what is served is no excuse."""
    tally, misses = count(question(), Candidate("1p1d", 1024), 200.0, 300)
    assert tally.share < 0.5
    assert misses["ttft"] >= tally.num_offered - tally.num_good


# ---- bounds


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
    assert (one.decode, one.mixed) == (pytest.approx(20.0), pytest.approx(10.0))

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


# ---- DistServe's algorithms


@pytest.mark.slow
def test_phases_alone_have_their_own_goodput() -> None:
    asked = question(workload="synthetic(1000,11)", slo=Slo(0.5, 0.02))
    (kind,) = kinds_of(PLAIN, 1)
    prefill = phase_alone(asked, kind, Role.PREFILL, TINY, in_turn).goodput
    decode = phase_alone(asked, kind, Role.DECODE, TINY, in_turn).goodput
    assert 6.0 < prefill < 1.1 / 0.110
    assert decode > 20 * prefill


@pytest.mark.slow
def test_high_affinity_takes_as_many_of_each_as_the_traffic_asks_for() -> None:
    asked = question(workload="synthetic(1000,11)", slo=Slo(0.5, 0.02), num_gpus=2)
    found = place(asked, "high", 20.0, TINY, in_turn)
    prefill = next(one for one in found.phases if one.role is Role.PREFILL)
    assert found.layout == f"{-(-20 // prefill.goodput):.0f}p1d"
    assert found.num_gpus == parse_layout(found.layout).num_workers


def test_high_affinity_takes_the_best_shapes_that_the_gpus_hold() -> None:
    def phase(role: Role, tp: int, per_gpu: float) -> Phase:
        return Phase(role, Shape(tp=tp), tp, tp * per_gpu)

    phases = [
        *(phase(Role.PREFILL, tp, per_gpu) for tp, per_gpu in ((2, 10.0), (4, 9.0), (1, 4.0))),
        *(
            phase(Role.DECODE, tp, per_gpu)
            for tp, per_gpu in ((8, 9.0), (6, 8.5), (4, 8.0), (1, 0.0))
        ),
    ]

    def chosen(num_gpus: int, rate: float | None = None) -> tuple[int, int]:
        prefill, decode = best_pair(phases, num_gpus, rate)
        return prefill.shape.tp, decode.shape.tp

    assert chosen(10) == (2, 8) == chosen(8, rate=50.0)  # a rate takes what it needs
    # With 6 GPUs for decoding two are left, for 20 a second; with 4 twice that, and decodes do 32.
    assert chosen(8) == chosen(9) == (2, 4)
    assert chosen(5) == (1, 4)
    with pytest.raises(ConfigError, match="4 GPUs hold no two shapes"):
        best_pair(phases, 4, None)
    with pytest.raises(ConfigError, match="no shape serves both"):
        best_pair(phases[:3], 8, None)


@pytest.mark.slow
def test_low_affinity_repeats_the_best_unit() -> None:
    asked = question(FAMILY, "synthetic(1000,4)", Slo(0.5, 0.05), num_gpus=3)
    found = place(asked, "low", None, FAST, in_turn)
    layouts = [one.candidate.layout for one in found.units]
    assert found.num_gpus <= 3
    per_gpu = [one.goodput / one.num_gpus for one in found.units]
    assert per_gpu == sorted(per_gpu, reverse=True)
    assert found.layout == layouts[0]
    twice = place(replace(asked, num_gpus=4), "low", 1.5 * found.units[0].goodput, FAST, in_turn)
    assert twice.num_gpus == 2 * twice.units[0].num_gpus


# ---- words


def test_the_command_starts_what_was_planned() -> None:
    candidate, asked = Candidate("2p1d", 512, window_s=0.0), question(slo=Slo(0.5, 0.05))
    command = (
        "nodeserve start 'my model' --layout 2p1d --max-num-seqs 64 --max-num-batched-tokens 512"
        " --window off{} --slo ttft=500ms,tpot=50ms"
    )
    context = asked.context
    for own, more in (
        (context, ""),
        (context // 2, ""),
        (2 * context, f" --max-model-len {context}"),  # else it has to have memory for twice that
        (None, f" --max-model-len {context}"),
    ):
        named = Named("my model", "plain", own)
        assert start_command(candidate, asked, named) == command.format(more)
    shorter = replace(asked, max_model_len=300)
    simulated = start_command(Candidate("1m:ep8", 512), shorter, Named(None, "plain"))
    assert "--max-model-len 300" in simulated


@pytest.mark.parametrize(
    ("model", "layout", "words"),
    [
        (PLAIN, "2m", "nodeserve start --layout 2m"),
        (PLAIN, "1p:ep8,1d:ep8", "nodeserve start --device sim --profile name --layout"),
        (replace(PLAIN, num_gpus=8), "1p1d", "nodeserve start --device sim --profile name"),
        (FAMILY, "1p1d", "nodeserve start --layout 1p1d"),
        (FAMILY, "1p:tp2,1d:tp2", "nodeserve start --layout 1p:tp2,1d:tp2"),
        (FAMILY, "1m:tp2.pp2", "nodeserve start --layout 1m:tp2.pp2"),
    ],
)
def test_only_commands_that_start_takes_are_printed(
    model: Profile | Family, layout: str, words: str
) -> None:
    """And what it takes, it takes: with as many sequences as were planned, whatever the device's
    own number is."""
    asked = question(model, num_gpus=16)
    command = start_command(Candidate(layout, 64), asked, Named(None, "name", asked.context))
    assert command.startswith(words)
    arguments = shlex.split(command)[2:]
    with start.make_context("start", arguments) as context:
        given = {name: value for name, value in context.params.items() if value is not None}
    config = EngineConfig(
        **{one.name: given[one.name] for one in fields(EngineConfig) if one.name in given}
    )
    if config.device == "sim":
        config = replace(config, profile="moe-ep8")  # a name that there is
    check_numbers(config)
    choose_layout(config.layout, 16)
    assert choose_budget(config, config.max_num_seqs or 256, 2048) == 64
