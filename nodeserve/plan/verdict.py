"""What a plan says in words: why this layout, and how to start it."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from nodeserve.layout import parse_layout
from nodeserve.plan.candidates import Candidate
from nodeserve.plan.evaluate import Question, count
from nodeserve.plan.planner import Report
from nodeserve.policy.profile import Profile

WORDS = {"ttft": "the first token is late", "tpot": "tokens are slow", "e2e": "the end is late"}
ABOVE = 1.2  # times the loser's goodput: where its first misses show


@dataclass(frozen=True, slots=True)
class Verdict:
    """`disaggregate` is None where no layout serves, or where the other kind's best does not surely
    miss the goal at the winner's goodput, the `checked_rate`, where it `attained` so much. `misses`
    are its first ones, by limit: a little above its own goodput."""

    disaggregate: bool | None
    reason: str
    checked_rate: float = 0.0
    attained: float | None = None
    misses: Mapping[str, int] | None = None


def verdict(report: Report) -> Verdict:
    """Which kind won, by how much, and what holds the other one back, by one more simulation."""
    best = report.best
    if best is None:
        return Verdict(None, _nothing(report))
    other_kind = "split" if best.candidate.kind == "mixed" else "mixed"
    other = report.best_of(other_kind)
    split = best.candidate.kind == "split"
    head = "disaggregate" if split else "do not disaggregate"
    if other is None or other.goodput <= 0.0:
        return Verdict(split, f"{head}: no {other_kind} layout serves enough requests in time")
    gain = best.goodput / other.goodput - 1.0
    rate, question = best.goodput, report.question
    # As many as in the closest looks: a short run at a high rate ends before anybody is late.
    sure = question.confidence
    at_winners, misses = count(question, other.candidate, rate, report.most_requests, sure)
    numbers = (
        f"{best.candidate.layout} serves {best.goodput:.3g} requests/s in time,"
        f" {other.candidate.layout} {other.goodput:.3g}"
    )
    if at_winners.interval(sure)[1] >= question.goal:
        reason = f"no clear winner: {numbers}, within what the runs can tell apart"
        return Verdict(None, reason, rate, at_winners.share)
    # Far above its goodput everything is late; what it misses first shows a little above it.
    little = min(rate, ABOVE * other.goodput)
    tally = at_winners
    if little < rate:
        tally, misses = count(question, other.candidate, little, report.most_requests, sure)
    seen = dict(misses.most_common())
    reason = f"{head}: {numbers} ({gain:+.0%})"
    if seen:
        limit, number = next(iter(seen.items()))
        share = number / (tally.num_offered - tally.num_good)
        reason += (
            f"; at {little:.3g}/s {other.candidate.layout} has {tally.share:.0%} in time, and of"
            f" the misses {share:.0%} are because {WORDS.get(limit, limit)}"
        )
    return Verdict(split, reason, rate, at_winners.share, seen)


def _nothing(report: Report) -> str:
    question = report.question
    if report.num_impossible == report.num_candidates:
        return (
            f"no layout of {question.num_gpus} GPUs can serve {question.goal:.0%} of these requests"
            " in time, not even one at a time: loosen the limits"
        )
    return f"no layout of {question.num_gpus} GPUs serves {question.goal:.0%} in time at any rate"


def settings_of(candidate: Candidate, question: Question) -> dict[str, str | int]:
    """The candidate as settings of a server, by the fields of EngineConfig."""
    settings: dict[str, str | int] = {
        "layout": candidate.layout,
        "max_num_seqs": question.num_seqs,
        "max_num_batched_tokens": candidate.max_num_batched_tokens,
    }
    if candidate.window_s is not None:
        settings["window"] = "off" if candidate.window_s == 0.0 else f"{1e3 * candidate.window_s:g}"
    return settings


@dataclass(frozen=True, slots=True)
class Named:
    """What a command names: a model, None for the default one, and a profile. `own_context` are the
    tokens that the model takes; None: nobody knows it here."""

    model: str | None
    profile: str
    own_context: int | None = None


def context_of(question: Question, own: int | None) -> int | None:
    """What --max-model-len must say: a model that takes more than was planned for would be given
    memory for it, more than there may be. None: nothing, its own context is no longer."""
    return None if own is not None and own <= question.context else question.context


def start_command(candidate: Candidate, question: Question, named: Named) -> str:
    """How a node like this is started; on simulated devices where a profile says nothing of what a
    rank is made of."""
    shapes = [group.shape for group in parse_layout(candidate.layout).groups]
    model = question.model
    simulated = isinstance(model, Profile) and (
        model.num_gpus > 1 or any(shape.ep > 1 and model.of(shape) is model for shape in shapes)
    )
    words = ["nodeserve", "start", *([named.model] if named.model else [])]
    own_context = named.own_context
    if simulated:
        words += ["--device", "sim", "--profile", named.profile]
        own_context = question.any_profile.max_model_len
    settings = settings_of(candidate, question)
    if (context := context_of(question, own_context)) is not None:
        settings["max_model_len"] = context
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    limits = [
        f"{name}={1e3 * limit_s:g}ms"
        for name, limit_s in (("ttft", question.slo.ttft_s), ("tpot", question.slo.tpot_s))
        if limit_s is not None
    ]
    return shlex.join([*words, *(["--slo", ",".join(limits)] if limits else [])])
