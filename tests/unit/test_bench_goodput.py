"""bench-goodput: which rates it runs, how well it knows what it found, and what it says of that."""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from bench.goodput.arms import Arm, Duel
from bench.goodput.bracket import (
    CLOSE,
    LEAST_RUNS,
    MOST_RUNS,
    STEP,
    Bracket,
    Run,
    clumping,
    surely_best,
)
from bench.goodput.live import SETTLE_S, good_of
from bench.goodput.tables import aims, judged, picture, values
from bench.goodput.twin import Twin, twin_of
from nodeserve.loadgen.bench import Result
from nodeserve.loadgen.measure import measure
from nodeserve.plan.candidates import Candidate
from nodeserve.plan.estimates import Estimate
from nodeserve.plan.evaluate import Question
from nodeserve.plan.goodput import Slo, Tally
from nodeserve.plan.requests import Requests, Source
from nodeserve.plan.search import Probe
from nodeserve.plan.verdict import Verdict
from tests.fakes.simulation import profile
from tests.unit.test_loadgen_measure import sample

NUM = 200
QUESTION = Question(profile(max_num_seqs=64), Source("chat", divisor=8.0), Slo(0.5, 0.05), 2)


def goods(share: float, num: int = NUM) -> list[bool]:
    """This share of them, spread evenly."""
    return [math.floor((n + 1) * share + 1e-9) > math.floor(n * share + 1e-9) for n in range(num)]


def climbed(guess: float, share_at: Callable[[float], float]) -> Bracket:
    """A bracket that asked as often as it wanted."""
    bracket = Bracket(guess)
    while (rate := bracket.next_rate()) is not None:
        bracket.add(rate, goods(share_at(rate)))
    return bracket


def falling(rate: float) -> float:
    """Attains 90 % up to 10 requests a second."""
    return max(0.0, min(1.0, 0.9 - 0.2 * (rate - 10.0)))


@pytest.mark.parametrize("guess", [7.0, 9.9, 10.1, 13.0])
def test_the_goodput_is_found_from_above_and_from_below(guess: float) -> None:
    bracket = climbed(guess, falling)
    assert bracket.bracketed and LEAST_RUNS <= len(bracket.runs) <= MOST_RUNS
    assert bracket.goodput == pytest.approx(10.0, rel=0.03)
    assert bracket.known.low < 10.0 < bracket.known.high and bracket.known.is_close


def test_the_first_rate_is_the_guess_and_the_next_one_step_away() -> None:
    bracket = Bracket(8.0)
    assert bracket.next_rate() == 8.0
    bracket.add(8.0, goods(1.0))
    assert bracket.next_rate() == pytest.approx(8.0 * STEP)
    down = Bracket(8.0)
    down.add(8.0, goods(0.0))
    assert down.next_rate() == pytest.approx(8.0 / STEP)


def test_a_rate_that_may_attain_only_by_chance_needs_one_below_it() -> None:
    bracket = Bracket(8.0)
    bracket.add(8.0, goods(0.91))
    bracket.add(9.0, goods(0.7))
    assert bracket.bracketed and bracket.known.low == 0.0
    assert bracket.next_rate() == pytest.approx(8.0 / STEP)
    bracket.add(8.0 / STEP, goods(0.99))
    assert 8.0 / STEP < bracket.known.low < 8.0 < bracket.known.high < 9.0
    above = Bracket(8.0)
    above.add(8.0, goods(0.99))
    above.add(9.0, goods(0.89))
    assert above.known.high == math.inf and above.next_rate() == pytest.approx(9.0 * STEP)


def test_runs_at_one_rate_count_together() -> None:
    bracket = Bracket(8.0)
    bracket.add(8.0, goods(1.0, 100))
    bracket.add(8.0, goods(0.5, 100))
    assert bracket.tallies == [(8.0, Tally(200, 150))] and bracket.curve == [(8.0, 0.75)]


@pytest.mark.parametrize(("share", "goodput"), [(0.0, 0.0), (1.0, 8.0 * STEP ** (MOST_RUNS - 1))])
def test_a_server_that_never_turns_is_given_up(share: float, goodput: float) -> None:
    bracket = climbed(8.0, lambda rate: share)
    assert len(bracket.runs) == MOST_RUNS and not bracket.bracketed
    assert bracket.goodput == pytest.approx(goodput) and not bracket.known.is_close


def chance(seed: int, num: int, runs: int, alike: int = 1) -> list[Run]:
    """Of requests of which so many have one fate."""
    rng = random.Random(seed)
    fates = [[rng.random() < 0.9 for _ in range(num // alike)] for _ in range(runs)]
    return [Run(8.0, tuple(fate for fate in one for _ in range(alike))) for one in fates]


@pytest.mark.parametrize("alike", [1, 3, 6])
def test_requests_that_share_their_fate_count_as_fewer(alike: int) -> None:
    assert clumping(chance(1, 1800, 12, alike)) == pytest.approx(alike, rel=0.3)
    assert clumping([Run(8.0, (True,) * NUM)]) == clumping([Run(8.0, (True, False))]) == 1.0


def test_a_draw_s_luck_is_no_part_of_what_is_known() -> None:
    """Every second run has easy requests, in the simulator as live: nothing of that is left."""
    bracket, plain = Bracket(10.0), Bracket(10.0)
    for place, rate in enumerate((9.0, 10.0, 10.5, 11.5)):
        luck = 0.05 if place % 2 else -0.05
        live, alike = goods(falling(rate) + luck), goods(0.92 + luck)
        bracket.add(rate, live, Twin(tuple(alike), 0.92))
        plain.add(rate, live)
    shares = dict(bracket.curve)
    assert shares[10.0] == pytest.approx(0.9, abs=0.01)
    assert shares[10.5] == pytest.approx(0.8, abs=0.01)
    assert bracket.goodput == pytest.approx(10.0, rel=0.01)
    assert abs(plain.goodput - 10.0) > 0.1


def test_misses_that_the_simulator_has_too_do_not_widen_the_error() -> None:
    together = tuple(sorted(goods(0.9)))
    seen = Run(9.0, together), Run(9.0, together, Twin(together, 0.9))
    assert clumping(seen[:1]) > 3.0 and clumping(seen[1:]) == 1.0


def test_the_twin_of_a_run_has_its_requests_and_its_limits() -> None:
    candidate = Candidate("2m", 128)
    arrivals = Requests(Source("chat", divisor=8.0, seed=3)).first(20, 4.0)
    twin = twin_of(QUESTION, candidate, 4.0, arrivals, 1.0)
    assert len(twin.good) == sum(one.arrived_s >= 1.0 for one in arrivals)
    assert 0.0 < twin.usual <= 1.0 and twin == twin_of(QUESTION, candidate, 4.0, arrivals, 1.0)
    strict = replace(QUESTION, slo=Slo(1e-3, 1e-3))
    assert not any(twin_of(strict, candidate, 4.0, arrivals, 1.0).good)


def width(good: Sequence[bool]) -> float:
    bracket = Bracket(
        8.0, [Run(8.0, (True,) * NUM), Run(9.0, tuple(good)), Run(10.0, (False,) * NUM)]
    )
    return bracket.known.high - bracket.known.low


def test_the_error_is_larger_with_fewer_requests_and_where_misses_come_together() -> None:
    apart, few = width(goods(0.9)), width(goods(0.9, NUM // 4))
    together = width(sorted(goods(0.9)))
    assert few > 1.5 * apart and together > 1.5 * apart


@pytest.mark.slow
def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(40):
        rng = random.Random(seed)
        bracket = Bracket(10.0)
        for rate in (9.0, 10.0, 10.5, 11.5):
            bracket.add(rate, [rng.random() < falling(rate) for _ in range(NUM)])
        held += bracket.known.low <= 10.0 <= bracket.known.high
    assert held >= 34  # of 38 that should; fewer than 35 of 40 come in 2 % of such experiments


def test_a_winner_is_ahead_by_more_than_the_errors() -> None:
    def at(goodput: float) -> Bracket:
        return climbed(goodput, lambda rate: falling(rate * 10.0 / goodput))

    assert surely_best({"a": at(10.0), "b": at(7.0)}) == "a"
    assert surely_best({"a": at(7.0), "b": at(10.0)}) == "b"
    assert surely_best({"a": at(10.0), "b": at(9.9)}) is None
    never = climbed(8.0, lambda rate: 0.0)
    assert surely_best({"a": never, "b": at(2.0)}) == "b" and surely_best({"a": never}) is None


def test_the_requests_that_were_good_are_those_of_the_report() -> None:
    slo = Slo(0.2, 0.05)
    samples = [sample(place, 0.1 if place % 3 else 0.3) for place in range(20)]
    report = measure(samples, lambda arrival: slo, 0.9, settle_s=SETTLE_S)
    assert report is not None
    result = Result(1.0, [one.job.arrival for one in samples], report, samples)
    good = good_of(result, slo)
    assert good == [place % 3 != 0 for place in range(5, 20)]
    assert Tally(len(good), sum(good)) == report.tally


def arm(kind: str, planned: float, live: float) -> Arm:
    candidate = Candidate("2m" if kind == "mixed" else "1p1d", 128)
    probe = Probe(planned, Tally(NUM, round(0.9 * NUM)))
    estimate = Estimate(candidate, planned, planned, None, 99.0, 2, (probe,))
    bracket = climbed(planned, lambda rate: falling(rate * 10.0 / live))
    return Arm(kind, estimate, {"max_num_batched_tokens": 128}, bracket)


def duel(planned: tuple[float, float], live: tuple[float, float], said: bool | None) -> Duel:
    arms = [
        arm(kind, *rates)
        for kind, rates in zip(("mixed", "split"), zip(planned, live, strict=True), strict=True)
    ]
    return Duel(QUESTION, Verdict(said, ""), arms)


def as_json(one: Duel) -> dict[str, Any]:
    told = json.loads(json.dumps(values(one), allow_nan=False))
    assert isinstance(told, dict)
    return told


@pytest.mark.parametrize(
    ("planned", "said", "live", "outcome", "rates_met"),
    [
        ((10.0, 6.0), False, (9.5, 6.2), "right", True),
        ((10.0, 6.0), False, (7.0, 9.0), "wrong", False),  # the other one won
        ((10.0, 9.5), None, (8.5, 10.5), "wrong", False),  # nobody was said to, one did
        ((10.0, 9.5), None, (10.0, 9.9), "right", True),
        ((10.0, 6.0), False, (10.0, 9.9), "open", False),  # the plan said it; nobody saw it
        ((10.0, 6.0), False, (10.0, 4.5), "right", False),
    ],
)
def test_the_aims_say_what_the_plan_knew(
    planned: tuple[float, float],
    said: bool | None,
    live: tuple[float, float],
    outcome: str,
    rates_met: bool,
) -> None:
    one = duel(planned, live, said)
    assert judged(one).outcome == outcome
    found = aims([one])
    assert [met for _, met in found] == [outcome == "right", rates_met, True]
    assert f"1 {outcome}" in found[0][0].replace("1 that these runs do not tell", "1 open")


def test_a_goodput_that_was_not_found_meets_no_aim() -> None:
    one = Duel(QUESTION, Verdict(False, ""), [arm("mixed", 10.0, 10.0)])
    one.arms[0].bracket = climbed(0.1, lambda rate: 1.0)
    assert [met for _, met in aims([one])][1:] == [False, False]
    (only,) = as_json(one)["arms"]
    assert only["live_high"] is None and "any less" in aims([one])[1][0]


def test_numbers_and_picture_hold_both_sides() -> None:
    one = duel((10.0, 6.0), (9.5, 6.2), False)
    assert judged(one) == ("mixed", "mixed")
    told = as_json(one)
    assert told["slo"] == "ttft:500 tpot:50" and told["live_winner"] == "mixed"
    mixed, _ = told["arms"]
    assert mixed["live_low"] < mixed["live"] < mixed["live_high"] < (1 + CLOSE) * mixed["live_low"]
    assert mixed["planned_curve"] == [[10.0, 180, NUM]]
    svg = picture([one])
    assert svg.count("<polyline") >= 4 and "ttft:500 tpot:50" in svg
    ticks = ["0", "2", "4", "6", "8", "10"]
    assert all(f"'middle' font-size='12' fill='#444444'>{tick}</text>" in svg for tick in ticks)
