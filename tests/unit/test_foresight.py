"""What newcomers can expect, how predictions are corrected, and what it is worth under overload."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeserve.plan.evaluate import FLOW
from nodeserve.plan.goodput import Slo
from nodeserve.plan.records import Arrival, Scenario, Served
from nodeserve.plan.simulator import simulate
from nodeserve.policy.account import Account
from nodeserve.policy.cost import RankWork
from nodeserve.policy.decode_allocation import DecodeAllocator
from nodeserve.policy.dispatcher import Dispatcher
from nodeserve.policy.foresight import CUT, MEMORY, SURE, Forecast, Foresight, Margin
from nodeserve.policy.units import DispatchOptions, Unit, Wait, Waiting
from nodeserve.types import Load

BUDGET, MAX_SEQS, BLOCKS = 100, 8, 1000
STEP_S, SEQ_S = 0.010, 0.001  # a decode step, and what each sequence adds


# ---- margins


def test_before_anything_was_seen_a_refusal_takes_certainty() -> None:
    assert Margin().safe_s(Wait(1.0, 1.0), 3.0) == pytest.approx(SURE * 2.0)


@given(st.floats(0.3, 3.0), st.floats(0.01, 10.0))
def test_a_margin_learns_what_predictions_are_worth(ratio: float, scale_s: float) -> None:
    margin = Margin()
    for _ in range(2 * MEMORY):
        margin.learn(Wait(scale_s, scale_s), 2.0 * scale_s * ratio)
    assert margin.likely == pytest.approx(ratio, rel=0.01)
    assert margin.safe_s(Wait(1.0, 0.0), 3.0) == pytest.approx(ratio, rel=0.01)


def test_the_more_results_vary_the_wider_it_is() -> None:
    steady, varied = Margin(), Margin()
    for turn in range(MEMORY):
        steady.learn(Wait(1.0, 0.0), 1.0)
        varied.learn(Wait(1.0, 0.0), 0.5 if turn % 2 else 1.5)
    likely = Wait(1.0, 0.0)
    assert varied.safe_s(likely, 2.0) > 1.5 > 1.1 > steady.safe_s(likely, 2.0)
    assert varied.safe_s(likely, 0.0) == pytest.approx(1.0, abs=0.05)


@given(st.lists(st.tuples(st.floats(0.0, 1e3), st.floats(0.0, 1e3), st.floats(0.0, 1e6))))
def test_no_past_keeps_out_who_stands_alone(past: list[tuple[float, float, float]]) -> None:
    margin = Margin()
    for others_s, own_s, actual_s in past:
        margin.learn(Wait(others_s, own_s), actual_s)
    assert margin.safe_s(Wait(0.0, 1.0), 3.0) <= SURE
    assert margin.safe_s(Wait(0.1, 1.0), 3.0) <= SURE + CUT * 0.1 + 1e-9


# ---- forecasts


def prefills(num_passes: int, *, mixed: bool = False) -> Dispatcher:
    """Instances that took 10 ms and 1 ms a token, and stand idle since time 0: number 0, or the
    decoders."""
    numbers = (1, 2) if mixed else (0,)
    units = [[Unit(number, number, Account(BLOCKS), mixed)] for number in numbers]
    dispatcher = Dispatcher(units, DispatchOptions(budget=BUDGET))
    for turn in range(num_passes):
        tokens = 20 + 10 * (turn % 5)
        dispatcher.times.observe([RankWork(tokens, tokens**2 / 2)], 0.010 + 0.001 * tokens)
    dispatcher.heard(numbers[0], 0.0)
    return dispatcher


def decodes(num_steps: int) -> DecodeAllocator:
    allocator = DecodeAllocator("cost", MAX_SEQS)
    for turn in range(num_steps):
        seqs = 1 + turn % MAX_SEQS
        allocator.observe([RankWork(0, 0.0, seqs, 16 * seqs)], STEP_S + SEQ_S * seqs)
    return allocator


def decoders(num_running: int) -> list[Unit]:
    """Two units with so many sequences of one block each."""
    units = []
    for index in (1, 2):
        account = Account(BLOCKS)
        account.report(Load(num_running, 0, 0, BLOCKS - num_running, 0, 0))
        units.append(Unit(index, index, account))
    return units


def forecast_of(foresight: Foresight, num_open: int) -> Forecast:
    units = decoders(min(num_open // 2, MAX_SEQS))
    found = foresight.forecast(Waiting(1, 16, 1, 0.0), 20, units, num_open, 0.0)
    assert found is not None
    return found


def test_nothing_is_forecast_of_what_was_never_seen() -> None:
    new = Waiting(1, 16, 1, 0.0)
    assert Foresight(prefills(0), decodes(50)).forecast(new, 20, decoders(0), 0, 0.0) is None
    for units, allocator in ((decoders(0), decodes(0)), ([], decodes(50))):
        found = Foresight(prefills(50), allocator).forecast(new, 20, units, 0, 0.0)
        assert found is not None and found.step is None and found.safe_tpot_s is None
        assert found.first.own_s == pytest.approx(0.026, rel=0.2)


def test_a_step_takes_longer_the_more_are_open() -> None:
    foresight = Foresight(prefills(50), decodes(200))
    steps = [forecast_of(foresight, num_open).step for num_open in (0, 7, 15)]
    for step, seqs in zip(steps, (1, 4, 8), strict=True):
        assert step is not None and step.own_s == pytest.approx(STEP_S + SEQ_S, rel=0.1)
        assert step.others_s == pytest.approx(SEQ_S * (seqs - 1), rel=0.1, abs=2e-4)


def test_beyond_what_decoders_hold_others_have_to_end_first() -> None:
    """Half of 16 places more: half of the time of an answer, spread over the tokens of a short
    one; where instances are mixed, before the first token."""
    foresight = Foresight(prefills(50), decodes(200))
    full, more = forecast_of(foresight, 15), forecast_of(foresight, 23)
    assert full.step is not None and more.step is not None
    assert more.step.others_s - full.step.others_s == pytest.approx(full.step.whole_s / 2, rel=0.1)
    assert more.first == full.first
    for _ in range(100):
        foresight.ended(None, 0.0, 40)
        foresight.ended(None, 0.0, 4)
    unequal = forecast_of(foresight, 23)
    assert unequal.step is not None
    assert unequal.step.others_s > 3 * more.step.others_s, "short answers cannot spread it so far"
    mixed = Foresight(prefills(50, mixed=True), decodes(200))
    full, more = forecast_of(mixed, 15), forecast_of(mixed, 23)
    assert more.first.others_s - full.first.others_s == pytest.approx(more.stay_s / 2, rel=0.01)


def test_in_mixed_instances_prompts_lengthen_the_steps() -> None:
    mixed, split = prefills(50, mixed=True), prefills(50)
    alone = forecast_of(Foresight(mixed, decodes(200)), 0)
    busy = forecast_of(Foresight(mixed, decodes(200)), 15)
    apart = forecast_of(Foresight(split, decodes(200)), 15)
    assert alone.step is not None and busy.step is not None and apart.step is not None
    assert alone.step.others_s == pytest.approx(0.0, abs=1e-4)
    assert busy.step.others_s > apart.step.others_s + 0.005


def test_the_more_are_refused_the_surer_one_must_be() -> None:
    """Where many come another takes the place; where few do nobody."""
    foresight = Foresight(prefills(50), decodes(200))
    for turn in range(MEMORY):
        said = forecast_of(foresight, 15)
        assert said.step is not None
        foresight.ended(said, said.step.whole_s * (5 if turn % 2 else 15), 10)
    calm = forecast_of(foresight, 15)
    for _ in range(4 * MEMORY):
        foresight.judged(refused=True)
    flooded = forecast_of(foresight, 15)
    assert calm.safe_tpot_s is not None and flooded.safe_tpot_s is not None
    assert flooded.safe_tpot_s > 2 * calm.safe_tpot_s
    for _ in range(4 * MEMORY):
        foresight.judged(refused=False)
    assert forecast_of(foresight, 15).safe_tpot_s == pytest.approx(calm.safe_tpot_s, rel=0.1)


# ---- what it is worth


def at(rate: float, seconds: float) -> list[Arrival]:
    """Prompts of 200 or 600 tokens and answers of 40, evenly, with limits of 500 and 40 ms."""
    return [
        Arrival(number / rate, 200 if number % 3 else 600, 40, 0, 0.5, 0.04)
        for number in range(int(rate * seconds))
    ]


def accepted(layout: str, rate: float, seconds: float) -> list[Served]:
    scenario = Scenario(
        layout,
        "llama-3.1-8b-h100",
        DispatchOptions(budget=2048, max_num_seqs=256),
        flow=FLOW,
    )
    outcome = simulate(scenario, at(rate, seconds))
    late = [one for one in outcome.served if one.arrival.arrived_s > 0.25 * seconds]
    return [one for one in late if one.outcome != "overloaded"]


def share(served: list[Served], well: Callable[[Served], bool]) -> float:
    return sum(map(well, served)) / len(served)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["1p1d", "1m"])
def test_who_comes_in_under_overload_is_served_in_time(layout: str) -> None:
    """An instance has 100,000 prompt tokens in 3 s. Before predictions were corrected all that
    stood at the limit came in, and at 1.5 times the capacity nobody was in time."""
    slo = Slo(0.5, 0.04)

    def in_time(one: Served) -> bool:
        return slo.met(one.timings.ttft_s, one.tpot_s)

    calm, flooded = accepted(layout, 30.0, 12.0), accepted(layout, 1500.0, 12.0)
    assert share(calm, in_time) > 0.95
    assert share(flooded, in_time) > 0.9 * share(calm, in_time)
    assert len(flooded) > 0.9 * len(calm), "and nobody is kept out for nothing"
