"""The motivating experiment: one A100 that does both phases against two that prefill and one that
decodes. OPT 13B, prompts of 512 tokens, answers of 64, limits 0.4 s and 0.04 s."""

from typing import NamedTuple

from bench.distserve.cases import (
    DISAGGREGATED,
    DISAGGREGATED_BUDGET,
    PREFILL_FIRST,
    VLLM_BUDGET,
    Arm,
)
from bench.distserve.phases import phase_rate
from bench.distserve.runs import Load, Protocol
from bench.distserve.tasks import Ask, Pool, seek
from nodeserve.layout import Shape
from nodeserve.plan.goodput import Slo
from nodeserve.types import Role

REQUESTS = "512+64"
LIMITS = Slo(0.4, 0.04)
ALONE = {"prefill alone": Role.PREFILL, "decode alone": Role.DECODE}
PAPER = {"collocated": 1.6, "prefill alone": 5.6, "decode alone": 10.0, "2 prefill, 1 decode": 3.3}
FAMILIES = {"vLLM's kernels": "opt-13b-a100-vllm", "DistServe's kernels": "opt-13b-a100"}


class Bar(NamedTuple):
    kernels: str
    name: str


def rate_of(task: tuple[Bar, Protocol]) -> float:
    """Requests a second and GPU."""
    (kernels, name), protocol = task
    family = FAMILIES[kernels]
    if (role := ALONE.get(name)) is not None:
        return phase_rate(family, role, Shape(), REQUESTS, LIMITS, protocol, PAPER[name])
    arms = {
        "collocated": Arm(PREFILL_FIRST, family, "1m", VLLM_BUDGET),
        "2 prefill, 1 decode": Arm(DISAGGREGATED, family, "2p1d", DISAGGREGATED_BUDGET),
    }
    return seek(Ask(Load(arms[name], REQUESTS, protocol), LIMITS, PAPER[name])).rate


def run(protocol: Protocol, pool: Pool) -> dict[Bar, float]:
    bars = [Bar(kernels, name) for kernels in FAMILIES for name in PAPER]
    rates = pool.each(rate_of, [(bar, protocol) for bar in bars], "Figure 1")
    return dict(zip(bars, rates, strict=True))
