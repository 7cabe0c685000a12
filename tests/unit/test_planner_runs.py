"""How long a planner's runs are, and what is run: searches of one candidate's goodput."""

import pytest

from nodeserve.layout import parse_layout
from nodeserve.plan import evaluate
from nodeserve.plan.candidates import Candidate, part_of
from nodeserve.plan.evaluate import Job, Question, count, search
from nodeserve.plan.goodput import Slo, Tally
from nodeserve.plan.search import Probe, SearchOptions
from tests.unit.test_planner import PLAIN, question


def test_no_run_is_made_twice_in_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stay of 36 s at the limits makes runs longer than what the search asks for at first, and
    the most requests that a run may have end that."""
    asked = question(slo=Slo(4.0, 4.0))
    made: list[tuple[float, int]] = []

    def counted(
        _: Question, __: Candidate, rate: float, number: int, ___: object
    ) -> tuple[Tally, object]:
        made.append((rate, number))
        return Tally(number, round(0.9 * number)), None

    monkeypatch.setattr(evaluate, "count", counted)
    options = SearchOptions(start=2.0, high=2.0, min_requests=10, max_requests=100)
    found = search(Job(asked, Candidate("1p1d", 1024), options, 36.0, 1000))
    assert found.rate == 2.0 and len(found.probes) > 3
    assert made == [(2.0, 216), (2.0, 432), (2.0, 864), (2.0, 1000)]  # three stays, then twice that


def test_a_run_lasts_some_stays_also_where_rates_are_high() -> None:
    """Ten seconds of decoding fill an instance only after ten seconds: in the first of them, a rate
    of a hundred looks good with so few sequences to decode."""
    asked = question(PLAIN, "synthetic(50,500)", Slo(1.0, 0.011))
    flattered, _ = count(asked, Candidate("1p1d", 1024), 40.0, 60)
    assert flattered.share > 0.9
    options = SearchOptions(start=40.0, low=40.0, high=40.0, min_requests=60, max_requests=60)
    found = search(Job(asked, Candidate("1p1d", 1024), options, 6.5, 5000))
    assert found.rate == 0.0 and found.probes[0].tally.share < 0.9


def test_a_run_that_has_failed_is_ended() -> None:
    """And says the same as one that goes on: the goal is missed."""
    asked = question()
    tally, _ = count(asked, Candidate("1p1d", 1024), 200.0, 300)
    assert tally.num_offered < 240  # of those that count
    assert tally.num_offered - tally.num_good == 25  # one too many of 240
    assert tally.num_planned == 240
    # One miss too many may be chance: nothing is decided by it, whatever those in the queue become.
    assert not Probe(200.0, tally).decided(0.9, 0.95)
    surely, _ = count(asked, Candidate("1p1d", 1024), 200.0, 300, 0.95)
    num_bad = surely.num_offered - surely.num_good
    assert 25 < num_bad < 60 and surely.num_planned == 240
    assert Probe(200.0, surely).decided(0.9, 0.95)
    assert not Probe(200.0, Tally(240, 241 - num_bad)).decided(0.9, 0.95)  # no later than needed


def test_a_run_that_cannot_fail_is_ended() -> None:
    """What is left cannot change what it says, and it is the longest that is left."""
    asked = question()
    good, _ = count(asked, Candidate("1p1d", 1024), 1.0, 300)
    assert (good.num_offered, good.num_planned, good.share) == (216, 240, 1.0)
    assert not Probe(1.0, good).decided(0.9, 0.95)  # all the others might have missed
    surely, _ = count(asked, Candidate("1p1d", 1024), 1.0, 300, 0.95)
    assert 216 < surely.num_good < 240 and Probe(1.0, surely).decided(0.9, 0.95)
    earlier = Tally(surely.num_offered - 1, surely.num_good - 1, surely.num_unknown + 1)
    assert not Probe(1.0, earlier).decided(0.9, 0.95)  # no later than needed
    few, _ = count(asked, Candidate("1p1d", 1024), 1.0, 20, 0.95)
    assert few == Tally(16, 16)  # so few can never be sure


@pytest.mark.parametrize(
    ("layout", "part", "number"),
    [
        ("8m", "2m", 4),
        ("4p4d", "2p2d", 2),
        ("6p2d", "6p2d", 1),
        ("6p:tp2,3d", "6p:tp2,3d", 1),
        ("9m", "3m", 3),
        ("12p6d", "4p2d", 3),
        ("7m", "7m", 1),
        ("1p1d", "1p1d", 1),
    ],
)
def test_parts_of_a_node(layout: str, part: str, number: int) -> None:
    found, times = part_of(Candidate(layout, 512, 0.0))
    assert times == number
    assert parse_layout(found.layout) == parse_layout(part)
    assert (found.max_num_batched_tokens, found.window_s) == (512, 0.0)
