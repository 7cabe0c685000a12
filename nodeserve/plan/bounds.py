"""What a layout can serve at most, on paper: a search leaves out what cannot win.

Fluid limits of a steady state, before any queue. With W seconds of work that a request brings
beside the fixed part F of a pass, S tokens that it writes and a pass that takes T, an instance that
gets r requests a second runs r S T sequences, and T = F + r W T. So T <= TPOT gives
r <= (1 - F / TPOT) / W, and memory for B sequences, r S T <= B, gives r <= B / (S F + B W). A
prefill pass takes at most a budget of tokens, which adds its fixed part to every so many. Requests
whose first pass alone is later than the TTFT are lost whatever the rate.

The bounds are generous: queues, noise, handoffs and uneven loads only make it worse.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from math import ceil, inf

from nodeserve.layout import parse_layout
from nodeserve.plan.candidates import Candidate, Kind
from nodeserve.plan.goodput import Slo
from nodeserve.policy.cost import StepCost
from nodeserve.policy.profile import Profile
from nodeserve.types import Role

SLACK = 1.1  # what fluctuations of a finite run may add


@dataclass(frozen=True, slots=True)
class Demand:
    """Requests, on average. `lengths` are prompts' tokens, a sample."""

    lengths: tuple[int, ...]
    prompt: float  # tokens
    prompt_pairs: float  # of tokens that a prompt's attention looks at
    output: float  # tokens, all but the first, which prefill gives
    context: float  # tokens that a decode step reads of one sequence


def demand_of(lengths: Sequence[tuple[int, int]]) -> Demand:
    """Of a sample of (prompt, output) tokens."""
    number = len(lengths)
    steps = sum(output - 1 for _, output in lengths)
    reads = sum((output - 1) * (prompt + output / 2) for prompt, output in lengths)
    return Demand(
        tuple(prompt for prompt, _ in lengths),
        sum(prompt for prompt, _ in lengths) / number,
        sum(prompt * prompt / 2 for prompt, _ in lengths) / number,
        steps / number,
        reads / steps if steps else 0.0,
    )


@dataclass(frozen=True, slots=True)
class Capacity:
    """Requests a second of one instance, doing one phase alone or both; infinite where there is
    nothing to do. `in_time` is the share whose prompts could make the TTFT on an idle instance."""

    prefill: float
    decode: float
    mixed: float
    in_time: float


def capacity(kind: Kind, demand: Demand, slo: Slo, budget: int, max_num_seqs: int) -> Capacity:
    """Of an instance of this kind with so many tokens a pass."""
    return _least(
        [_capacity(kind, cost, demand, slo, budget, max_num_seqs) for cost in _costs(kind)]
    )


def _costs(kind: Kind) -> list[StepCost]:
    """A pass takes the longest of these, so each of them is a bound."""
    cost = kind.profile.cost
    return [cost, cost.floor] if cost.floor else [cost]


def _least(found: Sequence[Capacity]) -> Capacity:
    return Capacity(*map(min, zip(*map(astuple, found), strict=True)))


def _capacity(
    kind: Kind, cost: StepCost, demand: Demand, slo: Slo, budget: int, max_num_seqs: int
) -> Capacity:
    profile = kind.profile
    lanes = profile.num_stages * kind.shape.ep
    token_s = cost.token_s + cost.expert_token_s
    prefill_s = token_s * demand.prompt + cost.attention_s * demand.prompt_pairs
    filled_s = prefill_s + cost.prefill_fix_s * demand.prompt / budget
    limit_s = inf if slo.ttft_s is None else slo.ttft_s
    in_time = sum(_alone_s(cost, tokens, budget) <= limit_s for tokens in demand.lengths)
    decodes = [
        _decode_rate(profile, one, demand, slo, max_num_seqs, beside_s)
        for beside_s in (0.0, prefill_s)
        for one in (cost, cost.large)
        if one is not None
    ]
    half = len(decodes) // 2
    return Capacity(
        lanes / filled_s if filled_s else inf,
        lanes * max(decodes[:half]),
        lanes * min(max(decodes[half:]), 1.0 / prefill_s if prefill_s else inf),
        in_time / len(demand.lengths),
    )


def _alone_s(cost: StepCost, tokens: int, budget: int) -> float:
    """A prompt by itself, on one rank."""
    own_s = (cost.token_s + cost.expert_token_s) * tokens + cost.attention_s * tokens * tokens / 2
    return ceil(tokens / budget) * cost.prefill_fix_s + own_s


def _decode_rate(
    profile: Profile,
    cost: StepCost,
    demand: Demand,
    slo: Slo,
    max_num_seqs: int,
    beside_s: float,
) -> float:
    """Requests a second of one lane whose passes also do `beside_s` of other work for each."""
    if not demand.output:
        return inf
    token_s = cost.decode_seq_s + cost.expert_token_s + cost.kv_token_s * demand.context
    work_s = beside_s + demand.output * token_s
    fix_s = cost.decode_fix_s
    most = float(max_num_seqs)
    if demand.context:
        most = min(most, profile.num_kv_tokens / demand.context)
    most /= profile.num_stages
    by_memory = most / (demand.output * fix_s + most * work_s) if fix_s or work_s else inf
    if slo.tpot_s is None:
        return by_memory
    by_time = (1.0 - fix_s / slo.tpot_s) / work_s if work_s else inf
    return max(0.0, min(by_memory, by_time))


@dataclass(frozen=True, slots=True)
class Sides:
    """Requests a second of a layout, by phase: whose instances do it alone, or could; and `both`
    when mixed ones share their time. `in_time` is the share whose prompts could make the TTFT."""

    prefill: float
    decode: float
    both: float
    in_time: float


def sides(
    candidate: Candidate, kinds: Sequence[Kind], demand: Demand, slo: Slo, max_num_seqs: int
) -> Sides:
    """What the instances of a layout can serve, added up."""
    known = {kind.shape: kind for kind in kinds}
    alone = dict.fromkeys(Role, 0.0)  # of those that do one phase and no other
    most = dict.fromkeys(Role, 0.0)  # and of mixed ones as well, if they did no other
    mixed: list[list[Capacity]] = []  # of each mixed instance, by each cost
    in_time = 0.0
    for group in parse_layout(candidate.layout).groups:
        kind, budget = known[group.shape], candidate.max_num_batched_tokens
        by_cost = [
            _capacity(kind, cost, demand, slo, budget, max_num_seqs) for cost in _costs(kind)
        ]
        one = _least(by_cost)
        for phase, rate in ((Role.PREFILL, one.prefill), (Role.DECODE, one.decode)):
            if group.role is phase:
                alone[phase] += group.count * rate
            if group.role in (phase, Role.MIXED):
                most[phase] += group.count * rate
        if group.role is Role.MIXED:
            mixed += [by_cost] * group.count
        if group.role is not Role.DECODE:
            in_time = max(in_time, one.in_time)
    rates = alone[Role.PREFILL], alone[Role.DECODE]
    both = [_both(*rates, each) for each in zip(*mixed, strict=False)] or [min(rates)]
    return Sides(most[Role.PREFILL], most[Role.DECODE], min(both), in_time)


def _both(prefill: float, decode: float, mixed: Sequence[Capacity]) -> float:
    """What instances that do one phase alone at these rates serve with these mixed ones.

    Of each request that a mixed instance prefills, and of each that it decodes, a share of its time
    goes. The formulas of the module's head are linear in both: who serves `mixed` doing both, and
    `decode` doing nothing else, needs 1 / decode for a request's decoding and what is left of
    1 / mixed for its prompt. Mixed ones of several shapes count as the best of each.
    """
    low, high = sorted((prefill, decode))
    number = float(len(mixed))
    decode_s = min(_inverse(one.decode) for one in mixed)
    prefill_s = min(
        _inverse(one.mixed) - _inverse(one.decode) if one.mixed else inf for one in mixed
    )
    first_s = prefill_s if prefill < decode else decode_s  # what the slower phase lacks
    if low < high:
        if first_s * (high - low) >= number:
            return low + number * _inverse(first_s)
        number -= first_s * (high - low)
    return high + number * _inverse(prefill_s + decode_s)


def _inverse(value: float) -> float:
    return 1.0 / value if value else inf


def bound(
    candidate: Candidate,
    kinds: Sequence[Kind],
    demand: Demand,
    slo: Slo,
    goal: float,
    max_num_seqs: int,
) -> float:
    """Requests a second that the layout's goodput cannot exceed. Refused requests take nothing, and
    `goal` says how many there may be."""
    found = sides(candidate, kinds, demand, slo, max_num_seqs)
    if found.in_time < goal:
        return 0.0
    return SLACK * min(found.prefill, found.decode, found.both) / goal
