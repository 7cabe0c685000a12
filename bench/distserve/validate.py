"""The simulator against runs on A100 GPUs: the same requests at the same times."""

import math
from typing import NamedTuple

from bench.distserve.cases import (
    DISAGGREGATED,
    DISAGGREGATED_BUDGET,
    PREFILL_FIRST,
    VLLM_BUDGET,
    Arm,
)
from bench.distserve.data import measured
from bench.distserve.runs import Times, serve, tally
from bench.report import percentile
from nodeserve.plan.goodput import GOAL, Slo
from nodeserve.plan.records import Arrival

LIMITS = Slo(0.25, 0.1)
MOST_POINTS, MOST_ERROR = 0.05, 0.10  # aims: attainment below the knee, medians
UNITS = Arm(DISAGGREGATED, "opt-13b-a100", "1p:tp2,1d", DISAGGREGATED_BUDGET)
ALONE = Arm(PREFILL_FIRST, "opt-13b-a100-vllm", "1m", VLLM_BUDGET)
RUNS = {
    **dict.fromkeys(
        ("distserve-300-3", "distserve-300-6", "distserve-600-6", "distserve-c21d11-300-9"), UNITS
    ),
    **dict.fromkeys(("vllm-100-1", "vllm-200-2", "vllm-300-3", "vllm-400-4"), ALONE),
}


class Compared(NamedTuple):
    """Real and simulated: share attained, median TTFT and TPOT in seconds."""

    name: str
    shares: tuple[float, float]
    ttft_s: tuple[float, float]
    tpot_s: tuple[float, float]

    @property
    def below_knee(self) -> bool:
        """Whether the real system attained the goal."""
        return self.shares[0] >= GOAL

    @property
    def errors(self) -> tuple[float, float, float]:
        """Points of attainment as a share; relative ones of the medians."""
        return (
            self.shares[1] - self.shares[0],
            self.ttft_s[1] / self.ttft_s[0] - 1,
            self.tpot_s[1] / self.tpot_s[0] - 1,
        )

    @property
    def met(self) -> bool:
        points, *medians = map(abs, self.errors)
        return points <= MOST_POINTS and max(medians) <= MOST_ERROR


def compare(name: str) -> Compared:
    """Replay one measured run."""
    rows = measured(name)
    real = [Times(row.ttft_s, row.tpot_s) for row in rows]
    requests = [
        Arrival(row.arrived_s, row.num_prompt_tokens, row.num_output_tokens) for row in rows
    ]
    ours = serve(RUNS[name], requests)
    both = (real, ours)
    ttft = [percentile([one.ttft_s or math.inf for one in times], 0.5) for times in both]
    tpot = [percentile([one.tpot_s or 0.0 for one in times], 0.5) for times in both]
    shares = [tally(times, LIMITS).share for times in both]
    return Compared(name, (shares[0], shares[1]), (ttft[0], ttft[1]), (tpot[0], tpot[1]))
