"""A live run's requests in the plan's simulator, and others like them: how lucky a draw it was.

Half a minute of requests is a small sample: a few long prompts that come together decide over some
percent of it. Whether its own requests do better in the simulator than such runs do on average
tells how much of a run's attainment was its draw (a control variate; Lavenberg and Welch 1981). A
simulator that is wrong does not shift what is measured, as long as it is as wrong for the others.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from nodeserve.plan.candidates import Candidate
from nodeserve.plan.evaluate import Question, missed_by
from nodeserve.plan.records import Arrival
from nodeserve.plan.requests import Source
from nodeserve.plan.simulator import simulate

NUM_OTHERS = 20
OTHERS = 1000  # the first of their seeds: no live run has it


class Twin(NamedTuple):
    """Which requests of a run were good in the simulator, and the share that is usual there."""

    good: tuple[bool, ...]
    usual: float

    @property
    def share(self) -> float:
        return sum(self.good) / len(self.good)

    @property
    def luck(self) -> float:
        """By how much the draw makes a run better than usual, as a share of its requests."""
        return self.share - self.usual


def twin_of(
    question: Question,
    candidate: Candidate,
    rate: float,
    arrivals: Sequence[Arrival],
    settle_s: float,
) -> Twin:
    """Of a run of these requests at this rate, of which those count that came after the settling
    time."""
    slo = question.slo
    own = [one._replace(ttft_slo_s=slo.ttft_s, tpot_slo_s=slo.tpot_s) for one in arrivals]
    others = []
    for seed in range(OTHERS, OTHERS + NUM_OTHERS):
        assert isinstance(question.traffic, Source)
        drawn = replace(question, traffic=replace(question.traffic, seed=seed))
        others += _good(question, candidate, drawn.requests(rate, len(arrivals)), settle_s)
    return Twin(tuple(_good(question, candidate, own, settle_s)), sum(others) / len(others))


def _good(
    question: Question, candidate: Candidate, arrivals: Sequence[Arrival], settle_s: float
) -> list[bool]:
    served = simulate(question.scenario(candidate), arrivals).served
    counted = [one for one in served if one.arrival.arrived_s >= settle_s]
    return [not missed_by(one, question.slo) for one in counted]
