"""Which layouts a search runs, and at which rates: on answers that are given, not simulated."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace

import pytest

from nodeserve.plan.candidates import Candidate
from nodeserve.plan.efforts import EFFORTS
from nodeserve.plan.estimates import FIRST, MOST_RATE, NEAR, Estimate, Estimator
from nodeserve.plan.evaluate import Job, Question
from nodeserve.plan.goodput import Slo, Tally
from nodeserve.plan.planner import PAPER, Planner
from nodeserve.plan.requests import Source
from nodeserve.plan.search import Found, Probe, find_goodput
from nodeserve.policy.cost import StepCost
from nodeserve.policy.profile import Family
from tests.unit.test_planner import PLAIN

SHAPES = Family("shapes", "a test", {(1, 1): PLAIN, (2, 1): replace(PLAIN, num_gpus=2)})
QUESTION = Question(SHAPES, Source("synthetic(500,20)"), Slo(1.0, 1.0), 8)


class Server:
    """Serves every layout at a share of its bound, `serves` for some; notes what it was asked."""

    def __init__(self, question: Question = QUESTION, **serves: float) -> None:
        self.question = question
        self.serves = serves
        self.asked: list[tuple[str, float]] = []
        self.estimator = Estimator(question, EFFORTS["normal"])

    def run(self, jobs: Sequence[Job]) -> list[Found]:
        return [self.search(job) for job in jobs]

    def search(self, job: Job) -> Found:
        candidate = job.candidate
        share = self.serves.get(candidate.layout, 0.8)
        goodput = share * self.estimator.most(candidate)

        def ask(rate: float, num_requests: int) -> Probe:
            self.asked.append((candidate.layout, rate))
            good = min(1.0, max(0.0, 0.9 + 2.0 * (1.0 - rate / goodput)))
            return Probe(rate, Tally(num_requests, round(good * num_requests)))

        return find_goodput(ask, job.options)

    def race(self, *candidates: Candidate, effort: str = "normal") -> list[Estimate]:
        return Planner(self.question, EFFORTS[effort], self.run).race(candidates)

    def layouts(self) -> list[str]:
        return list(dict.fromkeys(layout for layout, _ in self.asked))


def at(layout: str, chunk: int = 1024) -> Candidate:
    return Candidate(layout, chunk)


def test_of_those_with_one_slower_phase_the_one_with_the_widest_other_is_run() -> None:
    """The bound of all is that of their prefill instances."""
    server = Server()
    found = server.race(at("3p:tp2,1d:tp2"), at("3p:tp2,2d"), at("3p5d"))
    assert len({one.most for one in found}) == 1
    assert server.layouts() == ["3p5d", "3p:tp2,2d"]


def test_of_about_the_same_bound_small_instances_are_run_first() -> None:
    """They are the cheapest to run, and often the best."""
    half = {name: value / 2 for name, value in asdict(PLAIN.cost).items() if value}
    pair = replace(PLAIN, cost=replace(PLAIN.cost, **half), num_gpus=2)
    family = Family("even", "a test", {(1, 1): PLAIN, (2, 1): pair})
    server = Server(replace(QUESTION, model=family))
    found = server.race(at("4m:tp2"), at("8m"))
    assert len(found) == 2 and found[0].most == pytest.approx(found[1].most, rel=0.1)
    assert server.layouts() == ["2m", "2m:tp2"]


def test_who_has_no_bound_is_run() -> None:
    free = replace(PLAIN, cost=StepCost(0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    server = Server(replace(QUESTION, model=free))
    (found,) = server.race(at("8m"))
    assert found.most == math.inf and server.asked[0] == ("2m", FIRST * MOST_RATE)


def test_who_cannot_be_better_on_paper_is_not_run() -> None:
    server = Server(**{"7p1d": 0.92})
    bounds = [server.estimator.most(at("7p1d")), server.estimator.most(at("6p2d"))]
    assert PAPER * 0.92 * bounds[0] > bounds[1] > NEAR * 0.92 * bounds[0]
    candidates = at("6p2d"), at("7p1d", 1025), at("7p1d", 1024)
    server.race(*candidates)
    assert server.layouts() == ["7p1d"]
    server.race(*candidates, effort="thorough")
    assert server.layouts() == ["7p1d", "6p2d"]


def test_one_run_puts_out_who_does_not_come_near_the_best() -> None:
    server = Server(**{"7p1d": 0.7})
    found = server.race(at("7p1d"), at("8m", 1025), at("8m"))
    assert [one.candidate.layout for one in found] == ["8m", "8m"]
    asked = [rate for layout, rate in server.asked if layout == "7p1d"]
    assert asked == [NEAR * found[0].goodput]


def test_the_first_of_a_race_begins_at_a_part_of_its_bound() -> None:
    server = Server()
    server.race(at("7p1d"))
    assert server.asked[0] == ("7p1d", FIRST * server.estimator.most(at("7p1d")))


def test_no_rate_above_the_bound_is_asked() -> None:
    """Whatever it seems to serve there would not count."""
    server = Server(**{"6p2d": 1.5, "7p1d": 0.9})
    estimator = Estimator(QUESTION, EFFORTS["normal"], server.run)
    bounds = {layout: estimator.most(at(layout)) for layout in ("6p2d", "7p1d")}
    wanted = [(at(layout), most, 1.1 * most) for layout, most in bounds.items()]
    reached, below = estimator.closely(wanted)
    assert all(rate <= bounds[layout] for layout, rate in server.asked)
    assert [rate for layout, rate in server.asked if layout == "6p2d"] == [bounds["6p2d"]]
    assert reached.goodput == reached.high == bounds["6p2d"]
    assert below.goodput < 0.95 * bounds["7p1d"] and below.high is not None


def test_of_the_kind_that_loses_one_layout_is_looked_at_closely() -> None:
    server = Server()
    planner = Planner(QUESTION, EFFORTS["normal"], server.run)
    coarse = planner.race([at("8m"), at("8m", 1025)])
    assert planner.finalists(coarse, coarse[0].goodput) == coarse
    assert planner.num_behind == 0
    assert planner.finalists(coarse, 1.3 * coarse[0].goodput) == coarse[:1]
    assert planner.num_behind == 1


def test_a_range_has_two_ends() -> None:
    """Where the rates that pass do so barely, a lower one is asked; and a higher one where those
    that fail do."""
    server = Server(**{"7p1d": 0.8})
    estimator = Estimator(QUESTION, EFFORTS["normal"], server.run)
    most = estimator.most(at("7p1d"))
    goodput = 0.8 * most
    (found,) = estimator.closely([(at("7p1d"), 2.0 * most, goodput)])
    assert found.goodput == pytest.approx(goodput) and found.low == pytest.approx(0.95 * goodput)
    (found,) = estimator.closely([(at("7p1d"), 2.0 * most, 1.0001 * goodput)])
    assert found.goodput == pytest.approx(goodput, rel=0.01)
    assert found.high == pytest.approx(1.05 * goodput, rel=0.01)


@pytest.mark.parametrize("off", [1.04, 0.97, 0.93])
def test_three_rates_are_enough_from_a_good_guess(off: float) -> None:
    server = Server(**{"7p1d": 0.8})
    estimator = Estimator(QUESTION, EFFORTS["normal"], server.run)
    most = estimator.most(at("7p1d"))
    (found,) = estimator.closely([(at("7p1d"), most, off * 0.8 * most)])
    assert found.goodput == pytest.approx(0.8 * most, rel=0.02)
    assert len({rate for _, rate in server.asked}) == 3
