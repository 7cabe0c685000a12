"""From limits, requests and GPUs to a layout: the search that `nodeserve plan` runs.

Four rounds, each on what the one before left:

1. On paper: bounds say what a layout can serve at most (`bounds.py`); what cannot serve anybody in
   time is out.
2. Coarse: the most promising first, a short search of the goodput each. One run at a rate a little
   below the best of its kind is enough to put most of the others out, and what cannot reach that
   rate on paper is not run; nor is what shares its slower phase with one that is no better.
3. Fine: the best few of each kind again, with enough requests for a stated confidence.
4. Around the best: other chunks, no window, one instance in another role, while that gains.

Mixed and split layouts are raced apart, so the answer to "should phases be apart at all" has both
sides. Jobs of a round do not wait for each other's results within a batch of fixed size: the same
question gives the same plan, in however many processes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from nodeserve.layout import parse_layout
from nodeserve.plan.bounds import Demand, Sides, bound, demand_of, sides
from nodeserve.plan.candidates import (
    Candidate,
    Kind,
    all_candidates,
    gpus_of,
    kinds_of,
    neighbours,
    part_of,
    variations,
)
from nodeserve.plan.efforts import EFFORTS, Effort
from nodeserve.plan.evaluate import Job, Question, decided_range, search, stay_s, with_start
from nodeserve.plan.goodput import crossing
from nodeserve.plan.phases import PhaseLimits
from nodeserve.plan.search import STEP, Found, Probe, SearchOptions

BATCH = 2  # jobs that are given out together
NEAR = 0.85  # of the best so far: what is not surely below stays in the race
GAIN = 1.03  # that a change around the best must bring

Run = Callable[[Sequence[Job]], list[Found]]
Tell = Callable[[str], None]


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


@dataclass(frozen=True, slots=True)
class Report:
    """The finalists, the best first; and what became of the others."""

    question: Question
    ranked: tuple[Estimate, ...]
    num_candidates: int
    num_impossible: int  # nobody would be in time
    num_bounded: int  # left out on paper, or by what a layout with the same slower phase serves
    num_behind: int  # after a coarse run or two
    num_requests: int  # simulated
    most_requests: int  # in one run

    @property
    def best(self) -> Estimate | None:
        """None: no layout serves enough requests in time at any rate."""
        return self.ranked[0] if self.ranked and self.ranked[0].goodput > 0.0 else None

    def best_of(self, kind: str) -> Estimate | None:
        """Of mixed or split layouts."""
        return next((one for one in self.ranked if one.candidate.kind == kind), None)


def in_turn(jobs: Sequence[Job]) -> list[Found]:
    """One after the other, in this process."""
    return [search(job) for job in jobs]


def plan(
    question: Question,
    effort: Effort = EFFORTS["normal"],
    run: Run = in_turn,
    tell: Tell = lambda _: None,
) -> Report:
    """Search; ConfigError if the model fits no shape."""
    return Planner(question, effort, run, tell).plan()


@dataclass(slots=True)
class Planner:
    """One search."""

    question: Question
    effort: Effort
    run: Run = in_turn
    tell: Tell = lambda _: None
    by_gpu: bool = False  # what counts is goodput over the GPUs that a layout takes
    kinds: list[Kind] = field(init=False)
    demand: Demand = field(init=False)
    num_impossible: int = 0
    num_bounded: int = 0
    num_behind: int = 0
    num_requests: int = 0
    _stay_s: float = field(init=False)

    def __post_init__(self) -> None:
        question = self.question
        self.kinds = kinds_of(question.model, question.num_gpus, question.eps, question.plain)
        self.demand = demand_of(question.lengths())
        self._stay_s = stay_s(question, self.demand.output + 1.0)

    def plan(self) -> Report:
        """All four rounds."""
        question = self.question
        candidates = all_candidates(
            self.kinds,
            question.num_gpus,
            question.num_seqs,
            question.max_num_batched_tokens,
            question.dispatch.window_s,
        )
        self.tell(f"{len(candidates)} layouts")
        finalists: list[Estimate] = []
        for kind in ("mixed", "split"):
            coarse = self.race([one for one in candidates if one.kind == kind])
            fine = self.refine(coarse)
            finalists += fine
        finalists = self.improve(finalists)
        return Report(
            question,
            tuple(sorted(finalists, key=self.order)),
            len(candidates),
            self.num_impossible,
            self.num_bounded,
            self.num_behind,
            self.num_requests,
            self.effort.most_requests,
        )

    def units(self, candidates: Sequence[Candidate]) -> list[Estimate]:
        """The first three rounds over these, by goodput a GPU of their own; the best first."""
        self.by_gpu = True
        return sorted(self.refine(self.race(candidates)), key=self.order)

    def alone(self, candidate: Candidate, guess: float = 0.0) -> Estimate:
        """One layout, closely; `guess` is about where its goodput may be."""
        most = self.most(candidate)
        if guess <= 0.0 and most > 0.0:
            guess = self.estimate([(candidate, most, self._coarse(most, 0.0))])[0].goodput
        if guess <= 0.0 or most <= 0.0:
            return self._estimate(candidate, most, ())
        return self.closely([(candidate, most, guess)])[0]

    def order(self, one: Estimate) -> tuple[float, int, int, str, int]:
        """The most goodput first; then the fewest GPUs, mixed before split."""
        candidate = one.candidate
        return (
            -one.goodput / self._size(candidate),
            one.num_gpus,
            candidate.kind != "mixed",
            candidate.layout,
            candidate.max_num_batched_tokens,
        )

    def _size(self, candidate: Candidate) -> int:
        """What a goodput is divided by when two are compared."""
        return gpus_of(parse_layout(candidate.layout), self.kinds) if self.by_gpu else 1

    # ---- the rounds

    def race(self, candidates: Sequence[Candidate]) -> list[Estimate]:
        """Coarse estimates of those that may be among the best; the best first."""
        queue = [(one, most) for one in candidates if (most := self.most(one)) > 0.0]
        self.num_impossible += len(candidates) - len(queue)
        queue.sort(key=lambda pair: -pair[1] / self._size(pair[0]))
        found: list[Estimate] = []
        limits = PhaseLimits(self.sides)
        best = 0.0  # for each unit of size
        while queue:
            hopeful = [
                (one, most)
                for one, most in queue
                if most > NEAR * (top := best * self._size(one))
                and (self.effort.every or limits.allow(one, top))
            ]
            self.num_bounded += len(queue) - len(hopeful)
            batch, queue = hopeful[:BATCH], hopeful[BATCH:]
            tried = [(one, most, NEAR * best * self._size(one)) for one, most in batch]
            estimates = self.in_part(tried)
            for (one, _, least), estimate in zip(tried, estimates, strict=True):
                if served := estimate.goodput or least:  # less, where it did not reach the least
                    limits.note(one, served)
            self.num_behind += sum(one.goodput <= 0.0 for one in estimates)
            found += [one for one in estimates if one.goodput > 0.0]
            best = max([best, *(one.goodput / self._size(one.candidate) for one in found)])
            self.tell(f"{len(queue)} to try, best so far {best:.2f}/s")
        return sorted(found, key=self.order)

    def refine(self, coarse: Sequence[Estimate]) -> list[Estimate]:
        """Fine estimates of the best few."""
        worth = [one.goodput / self._size(one.candidate) for one in coarse]
        near = [one for one, value in zip(coarse, worth, strict=True) if value > NEAR * worth[0]]
        finalists = near[: self.effort.finalists]
        self.num_behind += len(coarse) - len(finalists)
        self.tell(f"{len(finalists)} to look at closely")
        return self.closely([(one.candidate, one.most, one.goodput) for one in finalists])

    def improve(self, finalists: list[Estimate]) -> list[Estimate]:
        """What is around the best of each kind, as long as it gains."""
        top = max((one.goodput for one in finalists), default=0.0)
        for kind in ("mixed", "split"):
            of_kind = sorted(
                (one for one in finalists if one.candidate.kind == kind), key=self.order
            )
            if of_kind and of_kind[0].goodput > NEAR * top:
                finalists += self._climb(of_kind[0], finalists)
        return finalists

    def _climb(self, best: Estimate, finalists: Sequence[Estimate]) -> list[Estimate]:
        seen = {one.candidate for one in finalists}
        better: list[Estimate] = []
        question = self.question
        keep_chunk = question.max_num_batched_tokens is not None
        keep_window = not question.dispatch.holds_door
        for _ in range(self.effort.moves):
            around = [
                *variations(best.candidate, question.num_seqs, keep_chunk, keep_window),
                *self._moves(best.candidate),
            ]
            todo = [one for one in around if one not in seen]
            seen.update(todo)
            asked = GAIN * best.goodput
            hopeful = [(one, most) for one in todo if (most := self.most(one)) > asked]
            self.tell(f"{len(hopeful)} around {best.candidate.layout}")
            options = self._coarse(asked, asked)  # that rate and no other
            tries = self.estimate([(one, most, options) for one, most in hopeful])
            ahead = sorted(
                (one for one in tries if one.goodput > 0.0),
                key=lambda one: -one.probes[-1].tally.share,
            )[:1]
            fine = self.closely([(one.candidate, one.most, one.goodput) for one in ahead])
            if not fine or fine[0].goodput < asked:
                break
            best = fine[0]
            better.append(best)
        return better

    def _moves(self, candidate: Candidate) -> list[Candidate]:
        """Within the GPUs there are, and with shapes as before."""
        kinds, most = self.kinds, self.question.num_gpus
        return [
            one for one in neighbours(candidate) if gpus_of(parse_layout(one.layout), kinds) <= most
        ]

    # ---- searches of one rate each

    def sides(self, candidate: Candidate) -> Sides:
        """What its phases can serve on paper."""
        question = self.question
        return sides(candidate, self.kinds, self.demand, question.slo, question.num_seqs)

    def most(self, candidate: Candidate) -> float:
        """Its bound, in requests a second."""
        question = self.question
        return bound(
            candidate, self.kinds, self.demand, question.slo, question.goal, question.num_seqs
        )

    def _coarse(self, most: float, least: float) -> SearchOptions:
        """From the rate that it must reach, or somewhere below its bound if there is none."""
        effort, question = self.effort, self.question
        start = least or min(most, 1e6) / 2
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
        )
        probes: dict[Candidate, list[Probe]] = {one: [] for one, _, _ in wanted}
        left = list(wanted)
        for _ in range(6):
            tried = self.estimate(
                [
                    (one, most, with_start(options, start, 0.8 * start, 1.2 * start))
                    for one, most, start in left
                ]
            )
            again: list[tuple[Candidate, float, float]] = []
            for (candidate, most, start), one in zip(left, tried, strict=True):
                probes[candidate] += one.probes
                passed = [probe.tally.share >= question.goal for probe in one.probes]
                if all(passed):
                    again.append((candidate, most, 1.4 * start))
                elif not any(passed):
                    again.append((candidate, most, 0.6 * start))
            left = again
        sure = options.look_confidence
        return [
            replace(self._estimate(candidate, most, probes[candidate], sure), fine=True)
            for candidate, most, _ in wanted
        ]

    def in_part(self, wanted: Sequence[tuple[Candidate, float, float]]) -> list[Estimate]:
        """Coarse estimates of candidates with their bound and a rate to reach, by a small node of
        the same proportions: it costs a part of what the whole does, and serves a little less than
        that part, since fewer instances even each other out."""
        parts = [part_of(candidate) for candidate, _, _ in wanted]
        found = self.estimate(
            [
                (part, most / number, self._coarse(most / number, least / number))
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
        return Estimate(
            candidate,
            rate,
            min(low, rate),
            high,
            most,
            gpus_of(parse_layout(candidate.layout), self.kinds),
            tuple(sorted(last.values(), key=lambda one: one.rate)),
        )
