"""Figure 11: what the placement algorithms find for 66B and ShareGPT; and how long they search.

Low affinity: prefill and decode share a node of eight GPUs, so shapes are tried jointly. High: each
phase takes its own best shape and as many instances as balance the two on 32 GPUs. Limits 0.4 s and
0.1 s, 25 requests a GPU, as in the authors' script. Panel a has what is attained against the rate,
panel b against a factor on both limits, at one rate and with the same layouts.
"""

import sys
import time
from dataclasses import dataclass
from operator import itemgetter

from bench.distserve.cases import (
    DISAGGREGATED,
    DISAGGREGATED_BUDGET,
    PREFILL_FIRST,
    VLLM_BUDGET,
    Arm,
)
from bench.distserve.phases import phase_rate
from bench.distserve.runs import Load, Protocol
from bench.distserve.tasks import Ask, Pool, Sought, race, scaled_at, share_at, units
from nodeserve.layout import Group, Layout, Shape
from nodeserve.plan.goodput import Slo, crossing
from nodeserve.policy.profiles import FAMILIES
from nodeserve.types import Role

RATES = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
SCALES, SCALED_RATE = (1.2, 1.0, 0.8, 0.6, 0.4), 0.25
# Percent attained at RATES and, at SCALED_RATE, at SCALES: the saved points of the authors' script
# (commit 326c481). Its vLLM is another shape in each panel, hence two numbers for one point.
PAPER = {
    "DistServe": (99.3, 99.3, 95.3, 88.0, 81.3, 77.3, 63.3),
    "vLLM": (62.0, 62.0, 58.0, 56.0, 48.0, 32.0, 28.0),
}
PAPER_SCALED = {
    "DistServe": (98.0, 95.3, 88.7, 74.0, 46.7),
    "vLLM": (79.0, 70.0, 58.0, 42.0, 7.0),
}
LIMITS = Slo(0.4, 0.1)
CLUSTER, NODE = 32, 8
# Seconds on 96 cores, for so many GPUs (Figure 12, the saved notebook).
SEARCH_S = {2: 5.0, 4: 15.0, 8: 30.0}
SEARCH_PROTOCOL = Protocol((0,), 100)
SEARCH_LIMITS = Slo(0.25, 0.1)


@dataclass(frozen=True, slots=True)
class Curves:
    """Of each way the layout found, what is attained at RATES and at SCALES, and the smallest scale
    that attains the goal."""

    layouts: dict[str, str]
    shares: dict[str, list[float]]
    scaled: dict[str, list[float]]
    smallest: dict[str, float | None]


def run(protocol: Protocol, pool: Pool) -> Curves:
    arms = {
        "vLLM": Arm(PREFILL_FIRST, "opt-66b-a100-vllm", "1m:tp4", VLLM_BUDGET),
        "vLLM++": _best_mixed(protocol, pool),
        "DistServe-Low": low_affinity("opt-66b-a100", NODE, LIMITS, protocol, 0.3, pool).arm,
        "DistServe-High": _high_affinity(protocol, pool),
    }
    asks = {name: Ask(Load(arm, "sharegpt", protocol), LIMITS, 0.0) for name, arm in arms.items()}
    asked = [(ask, rate) for ask in asks.values() for rate in RATES]
    shares = pool.each(share_at, asked, "Figure 11")
    scaled = pool.each(scaled_at, [(ask, SCALED_RATE, SCALES) for ask in asks.values()])
    by_name = dict(zip(arms, scaled, strict=True))
    return Curves(
        {name: arm.layout for name, arm in arms.items()},
        {name: [next(shares) for _ in RATES] for name in arms},
        {name: one.shares for name, one in by_name.items()},
        {name: one.smallest for name, one in by_name.items()},
    )


def paper_smallest(name: str) -> float | None:
    """The scale at which the paper's line attains the goal, straight between its points; None:
    at none of them."""
    shares = [percent / 100 for percent in PAPER_SCALED[name]]
    tightest = crossing([(-scale, share) for scale, share in zip(SCALES, shares, strict=True)])
    return None if tightest is None else -tightest


def low_affinity(
    family: str, num_gpus: int, limits: Slo, protocol: Protocol, start: float, pool: Pool
) -> Sought:
    """The best joint unit of one prefill and one decode instance on a node."""
    arms = units(family, num_gpus)
    print(f"{family}: {len(arms)} units on {num_gpus} GPUs", file=sys.stderr, flush=True)
    return race([Ask(Load(arm, "sharegpt", protocol), limits, start) for arm in arms], pool)


def search_times(num_gpus: tuple[int, ...], pool: Pool) -> dict[int, float]:
    """Seconds of this machine that the low affinity search takes for 13B."""
    taken = {}
    for number in num_gpus:
        began_s = time.perf_counter()
        low_affinity("opt-13b-a100", number, SEARCH_LIMITS, SEARCH_PROTOCOL, 2.0, pool)
        taken[number] = time.perf_counter() - began_s
    return taken


def _best_mixed(protocol: Protocol, pool: Pool) -> Arm:
    """By its rate at the goal or, where no shape attains that, by what it attains."""
    family = "opt-66b-a100-vllm"
    arms = [
        Arm(PREFILL_FIRST, family, f"1m:tp{tp}.pp{pp}", VLLM_BUDGET)
        for tp, pp in FAMILIES[family].shapes
        if tp * pp <= NODE
    ]
    asks = [Ask(Load(arm, "sharegpt", protocol), LIMITS, 0.1) for arm in arms]
    found = race(asks, pool)
    if found.rate:
        return found.arm
    shares = list(pool.each(share_at, [(ask, RATES[2]) for ask in asks], "vLLM++"))
    return arms[shares.index(max(shares))]


def _phase(task: tuple[Role, Shape, Protocol]) -> float:
    role, shape, protocol = task
    # As many requests as the whole cluster gets: of fewer, those that decode would all fit at once.
    whole = protocol._replace(per_gpu=protocol.per_gpu * CLUSTER // shape.num_workers)
    return phase_rate("opt-66b-a100", role, shape, "sharegpt", LIMITS, whole, 0.5)


def _high_affinity(protocol: Protocol, pool: Pool) -> Arm:
    """Best prefill and best decode shape by themselves, then their numbers on the cluster."""
    shapes = [Shape(tp, pp) for tp, pp in FAMILIES["opt-66b-a100"].shapes if tp * pp <= NODE]
    roles = (Role.PREFILL, Role.DECODE)
    tasks = [(role, shape, protocol) for role in roles for shape in shapes]
    rates = pool.each(_phase, tasks, "phases alone")
    (prefill_rate, prefill), (decode_rate, decode) = (
        max(((next(rates), shape) for shape in shapes), key=itemgetter(0)) for _ in roles
    )
    counts = [
        (num_prefill, num_decode)
        for num_prefill in range(1, CLUSTER)
        for num_decode in range(1, CLUSTER)
        if num_prefill * prefill.num_workers + num_decode * decode.num_workers <= CLUSTER
    ]

    def gpu_rate(count: tuple[int, int]) -> float:
        gpus = count[0] * prefill.num_workers, count[1] * decode.num_workers
        return min(gpus[0] * prefill_rate, gpus[1] * decode_rate) / sum(gpus)

    num_prefill, num_decode = max(counts, key=gpu_rate)
    layout = Layout(
        (Group(num_prefill, Role.PREFILL, prefill), Group(num_decode, Role.DECODE, decode))
    )
    return Arm(DISAGGREGATED, "opt-66b-a100", str(layout), DISAGGREGATED_BUDGET)
