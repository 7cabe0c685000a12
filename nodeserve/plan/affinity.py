"""DistServe's two placement algorithms, on this simulator.

High node affinity: pages may go from anywhere to anywhere, so each phase is optimised alone. The
shape with the most goodput a GPU is found for prefill under the TTFT, and for decode under the
TPOT; then there are as many instances of each as the traffic asks for.

Low node affinity: a prefill and a decode instance that share a node are searched together, because
pages must stay in it, and the unit is repeated. Here on one node, so a unit is one of each, and it
stays within the GPUs given; units that span nodes have no place.

Without a traffic to serve, both are spread over the GPUs given: phases apart as evenly as their
goodputs allow, units as often as they fit.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

from nodeserve.errors import ConfigError
from nodeserve.layout import Group, Layout, Shape, parse_layout
from nodeserve.plan.bounds import SLACK, capacity
from nodeserve.plan.candidates import Candidate, Kind
from nodeserve.plan.efforts import Effort
from nodeserve.plan.estimates import Estimate, Estimator, Run, in_turn
from nodeserve.plan.evaluate import Question
from nodeserve.plan.goodput import Slo
from nodeserve.plan.planner import BATCH, Planner, Tell
from nodeserve.policy.cost import StepCost
from nodeserve.policy.profile import Family, Profile
from nodeserve.types import Role

FREE = Shape(tp=512)  # the shape of a prefill instance that takes no time
INSTANT = StepCost(1e-6, 1e-6, 0.0, 0.0, 0.0, 0.0)
AT_ONCE = 1e30  # bytes a second
MOST_GPUS = 128  # that are simulated as a whole
ROOM = 4  # times what the decode instance holds


@dataclass(frozen=True, slots=True)
class Phase:
    """A shape's goodput at one phase alone, requests a second of one instance."""

    role: Role
    shape: Shape
    num_gpus: int
    goodput: float

    @property
    def per_gpu(self) -> float:
        return self.goodput / self.num_gpus


@dataclass(frozen=True, slots=True)
class Placement:
    """`estimate` is the whole layout's, simulated. `phases` or `unit` are what it was made from:
    the best first. `num_gpus` may be more than the node has, where the traffic asks for them."""

    algorithm: str
    layout: str
    num_gpus: int
    estimate: Estimate
    phases: tuple[Phase, ...] = ()
    units: tuple[Estimate, ...] = ()


def place(
    question: Question,
    algorithm: str,
    rate: float | None,
    effort: Effort,
    run: Run,
    tell: Tell = lambda _: None,
) -> Placement:
    """`algorithm` is high or low; `rate` the traffic to serve, None: what the GPUs can. ConfigError
    for a rate that needs far more GPUs than can be looked at as a whole."""
    if rate is not None:
        _check_rate(question, effort, rate)
    if algorithm == "high":
        return _high(question, rate, effort, run, tell)
    return _low(question, rate, effort, run, tell)


def _check_rate(question: Question, effort: Effort, rate: float) -> None:
    """By what GPUs do at most on paper, before anything is simulated."""
    estimator = Estimator(question, effort)
    found = [
        (capacity(one, estimator.demand, question.slo, _budget(question), question.num_seqs), one)
        for one in estimator.kinds
    ]
    prefill = max(one.prefill / kind.num_gpus for one, kind in found)
    decode = max(one.decode / kind.num_gpus for one, kind in found)
    if not prefill * decode:
        return  # said later, in other words
    _check_size(rate, ceil(rate * question.goal / SLACK * (1.0 / prefill + 1.0 / decode)))


def _check_size(rate: float, num_gpus: int) -> None:
    if num_gpus > MOST_GPUS:
        raise ConfigError(
            f"--rate {rate:g} needs {num_gpus} GPUs or more, and up to {MOST_GPUS} are simulated as"
            " a whole: divide the rate by a number of nodes"
        )


# ---- high node affinity


def _high(
    question: Question, rate: float | None, effort: Effort, run: Run, tell: Tell
) -> Placement:
    phases: list[Phase] = []
    for role in (Role.PREFILL, Role.DECODE):
        most = question.num_gpus - 1  # the other phase needs one
        kinds = [one for one in Estimator(question, effort, run).kinds if one.num_gpus <= most]
        tell(f"{role.value} alone: {len(kinds)} shapes")
        alone = partial(phase_alone, question, role=role, effort=effort, run=run)
        # Each shape's search asks one thing after the other: several at once keep processes busy.
        with ThreadPoolExecutor(1 if run is in_turn else BATCH) as together:
            found = list(together.map(alone, kinds))
        phases += sorted(found, key=lambda one: (-one.per_gpu, one.num_gpus))
    prefill, decode = best_pair(phases, question.num_gpus, rate)
    counts = _counts(prefill, decode, question.num_gpus, rate)
    layout = Layout(
        tuple(
            Group(number, one.role, one.shape)
            for number, one in zip(counts, (prefill, decode), strict=True)
        )
    )
    num_gpus = counts[0] * prefill.num_gpus + counts[1] * decode.num_gpus
    if rate is not None:
        _check_size(rate, num_gpus)
    guess = min(counts[0] * prefill.goodput, counts[1] * decode.goodput)
    estimate = _whole(replace(question, num_gpus=num_gpus), str(layout), guess, effort, run)
    return Placement("high", str(layout), num_gpus, estimate, tuple(phases))


def best_pair(phases: Sequence[Phase], num_gpus: int, rate: float | None) -> tuple[Phase, Phase]:
    """Shapes for prefill and decode, each with the most goodput a GPU; where the GPUs are given and
    do not hold these two, the pair that serves the most on them. `phases` come best first."""
    able = [one for one in phases if one.goodput > 0.0]
    pairs = [
        (one, two)
        for one in able
        for two in able
        if (one.role, two.role) == (Role.PREFILL, Role.DECODE)
    ]
    if not pairs:
        raise ConfigError(
            "no shape serves both phases in time apart: loosen --slo, or give more GPUs"
        )
    if rate is not None or sum(one.num_gpus for one in pairs[0]) <= num_gpus:
        return pairs[0]
    fitting = [pair for pair in pairs if sum(one.num_gpus for one in pair) <= num_gpus]
    if not fitting:
        raise ConfigError(
            f"{num_gpus} GPUs hold no two shapes that serve the phases apart: give more, or"
            " --algorithm search"
        )

    def served(pair: tuple[Phase, Phase]) -> float:
        prefill, decode = pair
        return _served(prefill, decode, _counts(prefill, decode, num_gpus, None))

    return max(fitting, key=served)


def _counts(prefill: Phase, decode: Phase, num_gpus: int, rate: float | None) -> tuple[int, int]:
    """Instances of each: for the traffic, or those that serve the most on these GPUs."""
    if rate is not None:
        return ceil(rate / prefill.goodput), ceil(rate / decode.goodput)
    fits = [
        (number, (num_gpus - number * prefill.num_gpus) // decode.num_gpus)
        for number in range(1, num_gpus // prefill.num_gpus + 1)
    ]
    return max(
        (pair for pair in fits if pair[1] > 0),
        key=lambda pair: (_served(prefill, decode, pair), -sum(pair)),
    )


def _served(prefill: Phase, decode: Phase, counts: tuple[int, int]) -> float:
    return min(counts[0] * prefill.goodput, counts[1] * decode.goodput)


def phase_alone(question: Question, kind: Kind, role: Role, effort: Effort, run: Run) -> Phase:
    """One instance that does nothing but one phase: prompts whose first token is the last, under
    the limit of the TTFT; or prompts that take no time, under that of the TPOT."""
    slo = question.slo
    if role is Role.PREFILL:
        alone = replace(question, slo=Slo(ttft_s=slo.ttft_s, e2e_s=slo.e2e_s), one_token=True)
        layout = str(Layout((Group(1, Role.MIXED, kind.shape),)))
    else:
        alone = replace(question, slo=Slo(tpot_s=slo.tpot_s, e2e_s=slo.e2e_s))
        alone = replace(alone, model=free_prefill(kind.shape, kind.profile))
        decode = Group(1, Role.DECODE, kind.shape)
        layout = str(Layout((Group(1, Role.PREFILL, FREE), decode)))
    if alone.slo == Slo():
        raise ConfigError("phases apart need both limits: give --slo ttft=..,tpot=..")
    alone = replace(alone, num_gpus=kind.num_gpus + (role is Role.DECODE) * FREE.num_workers)
    estimate = _whole(alone, layout, 0.0, effort, run)
    return Phase(role, kind.shape, kind.num_gpus, estimate.goodput)


def free_prefill(shape: Shape, profile: Profile) -> Family:
    """Of one shape with that profile, and one more, FREE, whose passes and handoffs take no time:
    with an instance of it, one that decodes is as if alone."""
    free = replace(
        profile,
        cost=INSTANT,
        noise=0.0,
        num_kv_tokens=ROOM * profile.num_kv_tokens,
        handoff_bytes_per_s=AT_ONCE,
        num_stages=1,
        num_gpus=FREE.num_workers,
    )
    real = replace(profile, handoff_bytes_per_s=AT_ONCE)
    shapes: Mapping[tuple[int, int], Profile] = {
        (FREE.tp, FREE.pp): free,
        (shape.tp, shape.pp): real,
    }
    return Family(profile.name, "decode alone", shapes)


def _whole(question: Question, layout: str, guess: float, effort: Effort, run: Run) -> Estimate:
    """One layout, simulated."""
    candidate = Candidate(layout, _budget(question), question.dispatch.window_s)
    return Estimator(question, effort, run).alone(candidate, guess)


def _budget(question: Question) -> int:
    chosen = question.max_num_batched_tokens
    return chosen or max(question.any_profile.max_num_batched_tokens, question.num_seqs)


# ---- low node affinity


def _low(question: Question, rate: float | None, effort: Effort, run: Run, tell: Tell) -> Placement:
    planner = Planner(question, effort, run, tell)
    kinds = planner.estimator.kinds
    budget, window_s = _budget(question), question.dispatch.window_s
    pairs = [
        Candidate(
            str(Layout((Group(1, Role.PREFILL, one.shape), Group(1, Role.DECODE, two.shape)))),
            budget,
            window_s,
        )
        for one in kinds
        for two in kinds
        if one.num_gpus + two.num_gpus <= question.num_gpus
    ]
    units = planner.units(pairs)
    if not units or not units[0].goodput:
        raise ConfigError("no pair of instances serves enough in time: loosen --slo, or more GPUs")
    best = units[0]
    fits = question.num_gpus // best.num_gpus
    number = fits if rate is None else ceil(rate / best.goodput)
    unit = parse_layout(best.candidate.layout)
    groups = Layout(tuple(replace(one, count=number * one.count) for one in unit.groups))
    num_gpus = number * best.num_gpus
    if rate is not None:
        _check_size(rate, num_gpus)
    whole = _whole(
        replace(question, num_gpus=num_gpus), str(groups), number * best.goodput, effort, run
    )
    return Placement("low", str(groups), num_gpus, whole, units=tuple(units))
