"""What the paper compares: models, requests and limits, its shapes, and its numbers.

Numbers come from the tables and plotting notebooks of DistServe (OSDI 2024); curves read from
figures are good to a percentage point. Rates are in requests a second and GPU.
"""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from nodeserve.layout import parse_layout
from nodeserve.plan.goodput import Slo

DISAGGREGATED, PREFILL_FIRST, CHUNKED = "disaggregated", "prefill-first", "chunked"


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to serve: how requests are batched, by whose kernels, in which shapes."""

    way: str
    family: str
    layout: str
    budget: int  # tokens of a pass

    @property
    def num_gpus(self) -> int:
        return parse_layout(self.layout).num_workers


@dataclass(frozen=True, slots=True)
class Model:
    """The shapes that the paper gives it; `most_gpus`: of a baseline whose shape is searched."""

    name: str
    layout: str
    mixed_layout: str
    most_gpus: int


class Paper(NamedTuple):
    """Per arm: DistServe, vLLM, DeepSpeed-MII; None where it has no number."""

    rates: tuple[float, float, float | None]
    scales: tuple[float, float, float | None]


class CurvePoint(NamedTuple):
    """Percent attained at a rate a GPU, as the paper's figures have it."""

    rate: float
    distserve: float
    vllm: float


@dataclass(frozen=True, slots=True)
class Case:
    """`scale_rate`: where the smallest SLO scale is sought; `requests_per_gpu`: of a run."""

    name: str
    model: Model
    lengths: str
    limits: Slo
    requests_per_gpu: int
    scale_rate: float

    def arm(self, way: str) -> Arm:
        """With the paper's shapes, each system with its own kernels."""
        model = self.model
        if way == DISAGGREGATED:
            return Arm(way, f"{model.name}-a100", model.layout, DISAGGREGATED_BUDGET)
        budget = CHUNK if way == CHUNKED else VLLM_BUDGET
        return Arm(way, f"{model.name}-a100-vllm", model.mixed_layout, budget)

    @property
    def paper(self) -> Paper:
        return PAPER[self.name]

    @property
    def curve(self) -> list[CurvePoint]:
        """The paper's, by rate."""
        return _curves()[self.name]


DISAGGREGATED_BUDGET, VLLM_BUDGET = 8192, 16384  # as the authors started both engines
CHUNK = 512  # of a chunked pass, unless it is searched
CHUNKS = (512, 2048)
CURVE_COLUMNS = ("rate_per_gpu", "distserve_percent", "vllm_percent")

OPT_13B = Model("opt-13b", "1p:tp2,1d", "1m", 4)
OPT_66B = Model("opt-66b", "1p:tp4,1d:tp2.pp2", "1m:tp4", 8)
OPT_175B = Model("opt-175b", "1p:tp3.pp3,1d:tp4.pp3", "1m:tp8", 12)

CASES = (
    Case("13B ShareGPT", OPT_13B, "sharegpt", Slo(0.25, 0.1), 100, 1.5),
    Case("66B ShareGPT", OPT_66B, "sharegpt", Slo(2.5, 0.15), 25, 0.75),
    Case("175B ShareGPT", OPT_175B, "sharegpt", Slo(4.0, 0.2), 25, 0.125),
    Case("66B HumanEval", OPT_66B, "humaneval", Slo(0.125, 0.2), 50, 0.875),
    Case("66B LongBench", OPT_66B, "longbench", Slo(15.0, 0.15), 25, 0.375),
)
PAPER = {
    "13B ShareGPT": Paper((2.30, 0.50, 0.3125), (0.667, 1.157, 1.20)),
    "66B ShareGPT": Paper((0.955, 0.347, 0.607), (0.732, 2.30, 1.32)),
    "175B ShareGPT": Paper((0.2016, 0.1013, None), (0.7615, 1.35, None)),
    "66B HumanEval": Paper((1.144, 0.200, 0.720), (0.875, 1.185, 1.116)),
    "66B LongBench": Paper((0.530, 0.125, 0.300), (0.795, 10.0, 2.06)),
}


@cache
def _curves() -> dict[str, list[CurvePoint]]:
    found: dict[str, list[CurvePoint]] = {}
    with (Path(__file__).parent / "paper_curves.csv").open(newline="") as lines:
        for row in csv.DictReader(lines):
            numbers = (float(row[name]) for name in CURVE_COLUMNS)
            found.setdefault(row["case"], []).append(CurvePoint(*numbers))
    return found
