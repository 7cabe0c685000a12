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
from dataclasses import dataclass, field
from math import log

from nodeserve.layout import parse_layout
from nodeserve.plan.candidates import (
    Candidate,
    all_candidates,
    gpus_of,
    neighbours,
    variations,
)
from nodeserve.plan.efforts import EFFORTS, Effort
from nodeserve.plan.estimates import MOST_RATE, NEAR, Estimate, Estimator, Run, in_turn
from nodeserve.plan.evaluate import Question
from nodeserve.plan.phases import PhaseLimits

BATCH = 2  # jobs that are given out together
PAPER = 0.95  # of the best so far: who cannot serve more even on paper is not run
ALIKE = 1.1  # times one bound is another that says the same
GAIN = 1.03  # that a change around the best must bring

Tell = Callable[[str], None]


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
    num_impossible: int = 0
    num_bounded: int = 0
    num_behind: int = 0
    estimator: Estimator = field(init=False)

    def __post_init__(self) -> None:
        self.estimator = Estimator(self.question, self.effort, self.run)

    def plan(self) -> Report:
        """All four rounds."""
        question = self.question
        candidates = all_candidates(
            self.estimator.kinds,
            question.num_gpus,
            question.num_seqs,
            question.max_num_batched_tokens,
            question.dispatch.window_s,
        )
        self.tell(f"{len(candidates)} layouts")
        races = [
            self.race([one for one in candidates if one.kind == kind])
            for kind in ("mixed", "split")
        ]
        top = max((one.goodput for found in races for one in found), default=0.0)
        near = [one for found in races for one in self.finalists(found, top)]
        finalists = self.improve(self.refine(near))
        return Report(
            question,
            tuple(sorted(finalists, key=self.order)),
            len(candidates),
            self.num_impossible,
            self.num_bounded,
            self.num_behind,
            self.estimator.num_requests,
            self.effort.most_requests,
        )

    def units(self, candidates: Sequence[Candidate]) -> list[Estimate]:
        """The first three rounds over these, by goodput a GPU of their own; the best first."""
        self.by_gpu = True
        coarse = self.race(candidates)
        top = self._worth(coarse[0]) if coarse else 0.0
        return sorted(self.refine(self.finalists(coarse, top)), key=self.order)

    def order(self, one: Estimate) -> tuple[float, int, int, str, int]:
        """The most goodput first; then the fewest GPUs, mixed before split."""
        candidate = one.candidate
        return (
            -self._worth(one),
            one.num_gpus,
            candidate.kind != "mixed",
            candidate.layout,
            candidate.max_num_batched_tokens,
        )

    def _worth(self, one: Estimate) -> float:
        """What two are compared by."""
        return one.goodput / self._size(one.candidate)

    @property
    def _paper(self) -> float:
        return NEAR if self.effort.every else PAPER

    def _size(self, candidate: Candidate) -> int:
        """What a goodput is divided by when two are compared."""
        return gpus_of(parse_layout(candidate.layout), self.estimator.kinds) if self.by_gpu else 1

    # ---- the rounds

    def race(self, candidates: Sequence[Candidate]) -> list[Estimate]:
        """Coarse estimates of those that may be among the best; the best first."""
        bounds = {one: self.estimator.most(one) for one in candidates}
        queue = sorted((one for one in candidates if bounds[one] > 0.0), key=self._promise)
        self.num_impossible += len(candidates) - len(queue)
        found: list[Estimate] = []
        limits = PhaseLimits(self.estimator.sides)
        best = 0.0  # for each unit of size
        while queue:
            hopeful = [
                one
                for one in queue
                if bounds[one] > self._paper * (top := best * self._size(one))
                and (self.effort.every or limits.allow(one, top))
            ]
            self.num_bounded += len(queue) - len(hopeful)
            batch = hopeful[:BATCH] if self.effort.every else limits.apart(hopeful, BATCH)
            queue = [one for one in hopeful if one not in batch]
            tried = [(one, bounds[one], NEAR * best * self._size(one)) for one in batch]
            estimates = self.estimator.in_part(tried)
            for (one, _, least), estimate in zip(tried, estimates, strict=True):
                if served := estimate.goodput or least:  # less, where it did not reach the least
                    limits.note(one, served)
            self.num_behind += sum(one.goodput <= 0.0 for one in estimates)
            found += [one for one in estimates if one.goodput > 0.0]
            best = max([best, *map(self._worth, found)])
            self.tell(f"{len(queue)} to try, best so far {best:.2f}/s")
        return sorted(found, key=self.order)

    def finalists(self, coarse: Sequence[Estimate], top: float) -> list[Estimate]:
        """The best one, and a few more that may be as good as the best of all, worth `top`."""
        near = [
            one for place, one in enumerate(coarse) if not place or self._worth(one) > NEAR * top
        ]
        chosen = near[: self.effort.finalists]
        self.num_behind += len(coarse) - len(chosen)
        return chosen

    def _promise(self, candidate: Candidate) -> tuple[int, int, float]:
        """The higher the bound the better. Of about the same, small instances come first: they need
        not wait for each other, and are run as a small part of the node. Of those that share their
        slower phase the one whose other phase can do most says the most about all of them."""
        most = self.estimator.most(candidate) / self._size(candidate)
        groups = parse_layout(candidate.layout).groups
        sizes = {kind.shape: kind.num_gpus for kind in self.estimator.kinds}
        return (
            -round(log(min(most, MOST_RATE)) / log(ALIKE)),
            max(sizes[group.shape] for group in groups),
            -self.estimator.widest(candidate),
        )

    def refine(self, coarse: Sequence[Estimate]) -> list[Estimate]:
        """Fine estimates."""
        self.tell(f"{len(coarse)} to look at closely")
        return self.estimator.closely([(one.candidate, one.most, one.goodput) for one in coarse])

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
            hopeful = [(one, most) for one in todo if (most := self.estimator.most(one)) > asked]
            self.tell(f"{len(hopeful)} around {best.candidate.layout}")
            options = self.estimator.coarse(asked, asked)  # that rate and no other
            tries = self.estimator.estimate([(one, most, options) for one, most in hopeful])
            ahead = sorted(
                (one for one in tries if one.goodput > 0.0),
                key=lambda one: -one.probes[-1].tally.share,
            )[:1]
            fine = self.estimator.closely([(one.candidate, one.most, one.goodput) for one in ahead])
            if not fine or fine[0].goodput < asked:
                break
            best = fine[0]
            better.append(best)
        return better

    def _moves(self, candidate: Candidate) -> list[Candidate]:
        """Within the GPUs there are, and with shapes as before."""
        kinds, most = self.estimator.kinds, self.question.num_gpus
        return [
            one for one in neighbours(candidate) if gpus_of(parse_layout(one.layout), kinds) <= most
        ]
