"""One phase alone: the other one costs nothing. What Figure 1 and the high affinity search need."""

from bench.distserve.cases import DISAGGREGATED, DISAGGREGATED_BUDGET, Arm
from bench.distserve.runs import Load, Protocol, at_most, highest_rate
from nodeserve.layout import Group, Layout, Shape
from nodeserve.plan.affinity import FREE, free_prefill
from nodeserve.plan.goodput import Slo
from nodeserve.policy.profiles import FAMILIES
from nodeserve.types import Role


def phase_rate(
    family: str,
    role: Role,
    shape: Shape,
    name: str,
    limits: Slo,
    protocol: Protocol,
    start: float,
) -> float:
    """The highest rate a GPU of one instance that only prefills, prompts whose first token is the
    last, within the TTFT; or only decodes, prompts that take no time, within the TPOT."""
    every = FAMILIES[family]
    if role is Role.PREFILL:
        layout = Layout((Group(1, Role.MIXED, shape),))
        name, limits = f"{name.partition('+')[0]}+1", Slo(ttft_s=limits.ttft_s)
    else:
        layout = Layout((Group(1, Role.PREFILL, FREE), Group(1, role, shape)))
        every, limits = free_prefill(shape, every.of(shape)), Slo(tpot_s=limits.tpot_s)
    arm = Arm(DISAGGREGATED, family, str(layout), DISAGGREGATED_BUDGET)

    load = Load(arm, name, protocol, shape.num_workers, every)
    return highest_rate(lambda gpu_rate: at_most(load, gpu_rate, limits), start)
