"""One phase alone: the other one costs nothing. What Figure 1 and the high affinity search need."""

from bench.distserve.cases import DISAGGREGATED, DISAGGREGATED_BUDGET, Arm
from bench.distserve.runs import Limits, Protocol, attained, counted, highest_rate
from nodeserve.layout import Shape
from nodeserve.policy.cost import StepCost
from nodeserve.policy.profile import Family, Profile
from nodeserve.policy.profiles import FAMILIES

FREE = (64, 1)  # the shape of who costs nothing: no family has it
NOTHING_S = 1e-6


def with_free(family: Family) -> Family:
    """The family, and an instance whose passes and handoffs take no time."""
    known = next(iter(family.shapes.values()))
    free = Profile(
        "free",
        "nothing",
        StepCost(NOTHING_S, NOTHING_S, 0.0, 0.0, 0.0, 0.0),
        noise=0.0,
        num_kv_tokens=4_000_000,
        kv_bytes_per_token=known.kv_bytes_per_token,
        handoff_bytes_per_s=1e18,
        max_num_batched_tokens=known.max_num_batched_tokens,
        max_num_seqs=known.max_num_seqs,
        max_model_len=known.max_model_len,
    )
    return Family(family.name, family.source, {**family.shapes, FREE: free})


def phase_rate(
    family: str,
    phase: str,
    shape: Shape,
    name: str,
    limits: Limits,
    protocol: Protocol,
    start: float,
) -> float:
    """The highest rate a GPU of one instance that only prefills ("p"), within the TTFT, or only
    decodes ("d"), within the TPOT."""
    word = f"1{phase}:tp{shape.tp}.pp{shape.pp}"
    other = f"1{'d' if phase == 'p' else 'p'}:tp{FREE[0]}"
    layout = f"{word},{other}" if phase == "p" else f"{other},{word}"
    arm = Arm(DISAGGREGATED, family, layout, DISAGGREGATED_BUDGET)
    alone = Limits(ttft_s=limits.ttft_s) if phase == "p" else Limits(tpot_s=limits.tpot_s)
    every = with_free(FAMILIES[family])

    def share(gpu_rate: float) -> float:
        runs = counted(arm, name, gpu_rate, protocol, num_gpus=shape.num_workers, family=every)
        return attained(runs, alone)

    return highest_rate(share, start)
