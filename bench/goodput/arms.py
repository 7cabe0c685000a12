"""The layouts that are compared: of each kind the one that `nodeserve plan` found best."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.goodput.bracket import Bracket
from nodeserve.config import EngineConfig
from nodeserve.layout import Shape
from nodeserve.loadgen.limits import limits_of
from nodeserve.loadgen.measure import Report
from nodeserve.plan.efforts import EFFORTS
from nodeserve.plan.estimates import Estimate
from nodeserve.plan.evaluate import Question
from nodeserve.plan.goodput import Slo
from nodeserve.plan.planner import plan
from nodeserve.plan.pool import searching
from nodeserve.plan.requests import Source
from nodeserve.plan.verdict import Verdict, settings_of, verdict
from nodeserve.policy.profile import Profile

KINDS = ("mixed", "split")


@dataclass(slots=True)
class Arm:
    """One layout under one SLO: what the plan said, and what came of it. `reports` are of its live
    runs, by rate, the last of each; `foreign` is the most that others had of the cores in a run."""

    kind: str
    predicted: Estimate
    settings: dict[str, str | int]
    bracket: Bracket
    reports: dict[float, Report] = field(default_factory=dict)
    foreign: float = 0.0

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        live = self.bracket.goodput
        return self.predicted.goodput / live - 1.0 if live > 0.0 else float("inf")


@dataclass(slots=True)
class Duel:
    """Both kinds under one SLO."""

    question: Question
    verdict: Verdict
    arms: list[Arm]

    @property
    def slo(self) -> Slo:
        return self.question.slo

    @property
    def title(self) -> str:
        """The limits as they are written."""
        return limits_of(self.slo).words()

    def config(self, arm: Arm, model: str | None) -> EngineConfig:
        """The server that the plan's command would start."""
        limits = zip(("ttft", "tpot"), self.slo.limits, strict=False)
        slo = ",".join(f"{name}={1e3 * s:g}ms" for name, s in limits if s is not None)
        return EngineConfig(model=model, device="cpu", slo=slo, **arm.settings)  # type: ignore[arg-type]


def plan_duel(profile: Profile, source: Source, slo: Slo, num_workers: int) -> Duel:
    """ConfigError if a kind has no layout that serves."""
    question = Question(profile, source, slo, num_workers, shapes=(Shape(),))
    with searching() as run:
        report = plan(question, EFFORTS["normal"], run)
        said = verdict(report)
    found: Sequence[Estimate | None] = [report.best_of(kind) for kind in KINDS]
    arms = [
        Arm(kind, one, settings_of(one.candidate, question), Bracket(round(one.goodput, 3)))
        for kind, one in zip(KINDS, found, strict=True)
        if one is not None and one.goodput > 0.0
    ]
    return Duel(question, said, arms)
