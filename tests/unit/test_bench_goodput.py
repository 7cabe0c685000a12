"""bench-goodput: which rates it runs, and what it says of them."""

from collections.abc import Callable

import pytest

from bench.goodput.arms import Arm, Duel
from bench.goodput.bracket import LEAST_RUNS, MOST_RUNS, STEP, Bracket, clear_winner
from bench.goodput.tables import aims, judged, picture, values
from nodeserve.plan.candidates import Candidate
from nodeserve.plan.goodput import Slo, Tally
from nodeserve.plan.planner import Estimate
from nodeserve.plan.search import Probe
from nodeserve.plan.verdict import Verdict

NUM = 200


def climbed(guess: float, share_at: Callable[[float], float]) -> Bracket:
    """A bracket that asked as often as it wanted."""
    bracket = Bracket(guess)
    while (rate := bracket.next_rate()) is not None:
        bracket.add(rate, Tally(NUM, round(NUM * share_at(rate))))
    return bracket


def falling(rate: float) -> float:
    """Attains 90 % up to 10 requests a second."""
    return max(0.0, min(1.0, 0.9 - 0.2 * (rate - 10.0)))


@pytest.mark.parametrize("guess", [7.0, 9.9, 10.1, 13.0])
def test_the_goodput_is_found_from_above_and_from_below(guess: float) -> None:
    bracket = climbed(guess, falling)
    assert bracket.bracketed and LEAST_RUNS <= bracket.num_runs <= MOST_RUNS
    assert bracket.goodput == pytest.approx(10.0, rel=0.02)


def test_the_first_rate_is_the_guess_and_the_next_one_step_away() -> None:
    bracket = Bracket(8.0)
    assert bracket.next_rate() == 8.0
    bracket.add(8.0, Tally(NUM, NUM))
    assert bracket.next_rate() == pytest.approx(8.0 * STEP)
    down = Bracket(8.0)
    down.add(8.0, Tally(NUM, 0))
    assert down.next_rate() == pytest.approx(8.0 / STEP)


def test_runs_at_one_rate_count_together() -> None:
    bracket = Bracket(8.0)
    bracket.add(8.0, Tally(100, 100))
    bracket.add(8.0, Tally(100, 50))
    assert bracket.curve == [(8.0, 0.75)] and bracket.num_runs == 2


@pytest.mark.parametrize(("share", "goodput"), [(0.0, 0.0), (1.0, 8.0 * STEP ** (MOST_RUNS - 1))])
def test_a_server_that_never_turns_is_given_up(share: float, goodput: float) -> None:
    bracket = climbed(8.0, lambda rate: share)
    assert bracket.num_runs == MOST_RUNS and not bracket.bracketed
    assert bracket.goodput == pytest.approx(goodput)


def test_a_winner_is_ahead_of_all_others_by_enough() -> None:
    assert clear_winner({"a": 10.0, "b": 9.0}, 0.05) == "a"
    assert clear_winner({"a": 10.0, "b": 9.8}, 0.05) is None
    assert clear_winner({"a": 0.0, "b": 2.0}, 0.05) == "b"


def arm(kind: str, planned: float, live: float) -> Arm:
    candidate = Candidate("2m" if kind == "mixed" else "1p1d", 128)
    probe = Probe(planned, Tally(NUM, round(0.9 * NUM)))
    estimate = Estimate(candidate, planned, planned, None, 99.0, 2, (probe,))
    bracket = climbed(planned, lambda rate: falling(rate * 10.0 / live))
    return Arm(kind, estimate, {"max_num_batched_tokens": 128}, bracket)


def duel(planned: tuple[float, float], live: tuple[float, float]) -> Duel:
    arms = [
        arm(kind, *rates)
        for kind, rates in zip(("mixed", "split"), zip(planned, live, strict=True), strict=True)
    ]
    return Duel(Slo(0.5, 0.05), Verdict(None, ""), arms)


@pytest.mark.parametrize(
    ("planned", "live", "winner_met", "rates_met"),
    [
        ((10.0, 6.0), (9.5, 6.2), True, True),
        ((10.0, 6.0), (7.0, 9.0), False, False),  # the other one won
        ((10.0, 9.9), (8.9, 10.0), False, True),  # nobody was said to, one did
        ((10.0, 6.0), (10.0, 9.8), True, False),  # nobody did
        ((10.0, 6.0), (10.0, 4.5), True, False),
    ],
)
def test_the_aims_say_what_the_plan_knew(
    planned: tuple[float, float], live: tuple[float, float], winner_met: bool, rates_met: bool
) -> None:
    found = aims([duel(planned, live)])
    assert [met for _, met in found] == [winner_met, rates_met, True]


def test_numbers_and_picture_hold_both_sides() -> None:
    one = duel((10.0, 6.0), (9.5, 6.2))
    assert judged(one) == ("mixed", "mixed")
    told = values(one)
    assert told["slo"] == "ttft:500 tpot:50" and told["live_winner"] == "mixed"
    svg = picture([one])
    assert svg.count("<polyline") >= 4 and "ttft:500 tpot:50" in svg
