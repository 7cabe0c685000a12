"""What layouts serve: on paper, by a short search, closely.

Each estimate is a search of rates by simulation, given out as a job; jobs that are given out
together do not wait for each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from nodeserve.layout import parse_layout
from nodeserve.plan.bounds import Demand, Sides, bound, demand_of, sides
from nodeserve.plan.candidates import Candidate, Kind, gpus_of, kinds_of, part_of
from nodeserve.plan.efforts import Effort
from nodeserve.plan.evaluate import Job, Question, decided_range, search, stay_s, with_start
from nodeserve.plan.goodput import crossing
from nodeserve.plan.search import STEP, Found, Probe, SearchOptions

NEAR = 0.9  # of the best so far: what is not surely below stays in the race
FIRST = 0.75  # of its bound: where to begin with a layout of which nothing is known
MOST_RATE = 1e6  # requests a second: where a bound is infinite

Run = Callable[[Sequence[Job]], list[Found]]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A candidate's goodput, in requests a second of the whole node. `low` to `high` is where it
    lies with the question's confidence; None: higher than anything asked. `most` is the bound."""

    candidate: Candidate
    goodput: float
    low: float
    high: float | None
    most: float
    num_gpus: int  # that the layout takes
    probes: tuple[Probe, ...] = ()
    fine: bool = False


def in_turn(jobs: Sequence[Job]) -> list[Found]:
    """One after the other, in this process."""
    return [search(job) for job in jobs]


@dataclass(slots=True)
class Estimator:
    """For one question. `num_requests` were simulated so far."""

    question: Question
    effort: Effort
    run: Run = in_turn
    kinds: list[Kind] = field(init=False)
    demand: Demand = field(init=False)
    num_requests: int = 0
    _stay_s: float = field(init=False)

    def __post_init__(self) -> None:
        question = self.question
        self.kinds = kinds_of(question.model, question.num_gpus, question.eps, question.shapes)
        self.demand = demand_of(question.lengths())
        self._stay_s = stay_s(question, self.demand.output + 1.0)

    def sides(self, candidate: Candidate) -> Sides:
        """What its phases can serve on paper."""
        question = self.question
        return sides(candidate, self.kinds, self.demand, question.slo, question.num_seqs)

    def widest(self, candidate: Candidate) -> float:
        """What the faster of its phases can serve on paper."""
        found = self.sides(candidate)
        return max(found.prefill, found.decode)

    def most(self, candidate: Candidate) -> float:
        """Its bound, in requests a second."""
        question = self.question
        return bound(
            candidate, self.kinds, self.demand, question.slo, question.goal, question.num_seqs
        )

    def alone(self, candidate: Candidate, guess: float = 0.0) -> Estimate:
        """One layout, closely; `guess` is about where its goodput may be."""
        most = self.most(candidate)
        if guess <= 0.0 and most > 0.0:
            guess = self.estimate([(candidate, most, self.coarse(most, 0.0))])[0].goodput
        if guess <= 0.0 or most <= 0.0:
            return self._estimate(candidate, most, ())
        return self.closely([(candidate, most, guess)])[0]

    def coarse(self, most: float, least: float) -> SearchOptions:
        """From the rate that it must reach, or a part of its bound if there is none."""
        effort, question = self.effort, self.question
        start = least or FIRST * min(most, MOST_RATE)
        return SearchOptions(
            start=start,
            low=least,
            high=max(start, most),
            goal=question.goal,
            confidence=question.confidence,
            tolerance=0.2,
            min_requests=effort.coarse_requests,
            max_requests=effort.coarse_requests,
            max_probes=12,
            step=1.0 / NEAR if least else STEP,  # the next rate is that of the best
        )

    def closely(self, wanted: Sequence[tuple[Candidate, float, float]]) -> list[Estimate]:
        """Of candidates with their bound and a first guess: from it up and down until both sides
        are found."""
        effort, question = self.effort, self.question
        options = SearchOptions(
            start=1.0,
            goal=question.goal,
            confidence=question.confidence,
            tolerance=effort.tolerance,
            min_requests=effort.fine_requests,
            max_requests=4 * effort.fine_requests,
            max_probes=10,
            step=1.0 + 1.9 * effort.tolerance,  # one bisection makes it less than the tolerance
        )
        probes: dict[Candidate, list[Probe]] = {one: [] for one, _, _ in wanted}
        left = [(one, most, min(start, most)) for one, most, start in wanted]
        for _ in range(6):
            tried = self.estimate(
                [
                    (one, most, with_start(options, start, 0.8 * start, min(1.2 * start, most)))
                    for one, most, start in left
                ]
            )
            again: list[tuple[Candidate, float, float]] = []
            for (candidate, most, start), one in zip(left, tried, strict=True):
                probes[candidate] += one.probes
                passed = [probe.tally.share >= question.goal for probe in one.probes]
                if all(passed) and one.probes[-1].rate < most:
                    again.append((candidate, most, min(1.4 * start, most)))
                elif not any(passed):
                    again.append((candidate, most, 0.6 * start))
            left = again
        self._look_around(wanted, probes, options)
        sure = options.look_confidence
        return [
            replace(self._estimate(candidate, most, probes[candidate], sure), fine=True)
            for candidate, most, _ in wanted
        ]

    def _look_around(
        self,
        wanted: Sequence[tuple[Candidate, float, float]],
        probes: dict[Candidate, list[Probe]],
        options: SearchOptions,
    ) -> None:
        """One more run where no rate is surely served, a little below the goodput; and one a little
        above where none surely is not."""
        looks = []
        for candidate, most, _ in wanted:
            found = self._estimate(candidate, most, probes[candidate], options.look_confidence)
            ends = [1.0 - options.tolerance] * (not found.low)
            ends += [1.0 + options.tolerance] * (found.high is None)
            for rate in (min(end * found.goodput, most) for end in ends if found.goodput > 0.0):
                looks.append((candidate, most, with_start(options, rate, rate, rate)))
        for one in self.estimate(looks):
            probes[one.candidate] += one.probes

    def in_part(self, wanted: Sequence[tuple[Candidate, float, float]]) -> list[Estimate]:
        """Coarse estimates of candidates with their bound and a rate to reach, by a small node of
        the same proportions: it costs a part of what the whole does, and serves a little less than
        that part, since fewer instances even each other out."""
        parts = [part_of(candidate) for candidate, _, _ in wanted]
        found = self.estimate(
            [
                (part, most / number, self.coarse(most / number, least / number))
                for (part, number), (_, most, least) in zip(parts, wanted, strict=True)
            ]
        )
        return [
            self._estimate(
                candidate,
                most,
                [replace(probe, rate=number * probe.rate) for probe in one.probes],
            )
            for (candidate, most, _), (_, number), one in zip(wanted, parts, found, strict=True)
        ]

    def estimate(self, wanted: Sequence[tuple[Candidate, float, SearchOptions]]) -> list[Estimate]:
        """One search each."""
        jobs = [
            Job(self.question, one, options, self._stay_s, self.effort.most_requests)
            for one, _, options in wanted
        ]
        estimates = [
            self._estimate(candidate, most, found.probes)
            for (candidate, most, _), found in zip(wanted, self.run(jobs), strict=True)
        ]
        self.num_requests += sum(
            probe.tally.num_offered for one in estimates for probe in one.probes
        )
        return estimates

    def _estimate(
        self,
        candidate: Candidate,
        most: float,
        probes: Sequence[Probe],
        confidence: float | None = None,
    ) -> Estimate:
        """Where attainment crosses the goal, by the run with the most requests of each rate.
        `confidence` of each look; None: there was one."""
        question = self.question
        last = {
            probe.rate: probe for probe in sorted(probes, key=lambda one: one.tally.num_planned)
        }
        points = [(rate, probe.tally.share) for rate, probe in last.items()]
        low, high = decided_range(
            list(last.values()), question.goal, confidence or question.confidence
        )
        # More than the bound is what a run too short for a queue to grow would seem to serve.
        rate = min(most, crossing(points, question.goal) or 0.0)
        if high is None and any(asked >= most for asked in last):
            high = most
        return Estimate(
            candidate,
            rate,
            min(low, rate),
            high,
            most,
            gpus_of(parse_layout(candidate.layout), self.kinds),
            tuple(sorted(last.values(), key=lambda one: one.rate)),
        )
