"""One phase alone: the other one costs nothing. What Figure 1 and the high affinity search need."""

from bench.distserve.cases import DISAGGREGATED, DISAGGREGATED_BUDGET, Arm
from bench.distserve.runs import Protocol, counted, highest_rate, tally
from nodeserve.layout import Group, Layout, Shape
from nodeserve.plan.affinity import FREE, free_prefill
from nodeserve.plan.goodput import Slo, Tally
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

    def attained(gpu_rate: float) -> Tally:
        times = counted(arm, name, gpu_rate, protocol, num_gpus=shape.num_workers, family=every)
        return tally(times, limits)

    return highest_rate(attained, start)
