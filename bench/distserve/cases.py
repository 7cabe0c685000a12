"""What the paper compares: models, requests and limits, its shapes, and its numbers.

Numbers come from the tables and plotting notebooks of DistServe (OSDI 2024); curves read from
figures are good to a percentage point. Rates are in requests a second and GPU.
"""

from dataclasses import dataclass

from nodeserve.layout import parse_layout

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
class Paper:
    """Per arm: DistServe, vLLM, DeepSpeed-MII; None where it has no number."""

    rates: tuple[float, float, float | None]
    scales: tuple[float, float, float | None]
    curve_rates: tuple[float, ...]
    curve: tuple[float, ...]  # percent that DistServe attained at these
    vllm_curve: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """`scale_rate`: where the smallest SLO scale is sought; `requests_per_gpu`: of a run."""

    name: str
    model: str
    lengths: str
    ttft_s: float
    tpot_s: float
    layout: str
    mixed_layout: str
    requests_per_gpu: int
    scale_rate: float
    most_gpus: int  # of a searched baseline
    paper: Paper

    def arm(self, way: str) -> Arm:
        """With the paper's shapes, each system with its own kernels."""
        if way == DISAGGREGATED:
            return Arm(way, f"{self.model}-a100", self.layout, DISAGGREGATED_BUDGET)
        budget = CHUNK if way == CHUNKED else VLLM_BUDGET
        return Arm(way, f"{self.model}-a100-vllm", self.mixed_layout, budget)


DISAGGREGATED_BUDGET, VLLM_BUDGET = 8192, 16384  # as the authors started both engines
CHUNK = 512  # of a chunked pass, unless it is searched
CHUNKS = (512, 2048)

CASES = (
    Case(
        "13B ShareGPT",
        "opt-13b",
        "sharegpt",
        0.25,
        0.1,
        "1p:tp2,1d",
        "1m",
        100,
        1.5,
        4,
        Paper(
            (2.30, 0.50, 0.3125),
            (0.667, 1.157, 1.20),
            (0.5, 1, 1.5, 2, 2.25, 2.5, 3),
            (100, 100, 100, 93.8, 91.7, 85, 74.8),
            (90, 85, 81, 71, 70, 68, 55),
        ),
    ),
    Case(
        "66B ShareGPT",
        "opt-66b",
        "sharegpt",
        2.5,
        0.15,
        "1p:tp4,1d:tp2.pp2",
        "1m:tp4",
        25,
        0.75,
        8,
        Paper(
            (0.955, 0.347, 0.607),
            (0.732, 2.30, 1.32),
            (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1),
            (100, 98, 100, 98.6, 99, 98.1, 86),
            (97.1, 88.1, 81, 67.4, 58.1, 51, 43.3),
        ),
    ),
    Case(
        "175B ShareGPT",
        "opt-175b",
        "sharegpt",
        4.0,
        0.2,
        "1p:tp3.pp3,1d:tp4.pp3",
        "1m:tp8",
        25,
        0.125,
        12,
        Paper(
            (0.2016, 0.1013, None),
            (0.7615, 1.35, None),
            (0.0625, 0.09375, 0.125, 0.15625, 0.1875, 0.21875, 0.25),
            (100, 100, 99.5, 99, 96.2, 83.1, 74.8),
            (98.1, 93.6, 79.3, 34, 21.2, 15.2, 10),
        ),
    ),
    Case(
        "66B HumanEval",
        "opt-66b",
        "humaneval",
        0.125,
        0.2,
        "1p:tp4,1d:tp2.pp2",
        "1m:tp4",
        50,
        0.875,
        8,
        Paper(
            (1.144, 0.200, 0.720),
            (0.875, 1.185, 1.116),
            (0.125, 0.375, 0.625, 0.875, 1.125, 1.375, 1.625),
            (98.5, 97.5, 96.7, 94.3, 91.2, 87.1, 78.8),
            (91.5, 86.5, 79.5, 71, 65, 56.5, 38),
        ),
    ),
    Case(
        "66B LongBench",
        "opt-66b",
        "longbench",
        15.0,
        0.15,
        "1p:tp4,1d:tp2.pp2",
        "1m:tp4",
        25,
        0.375,
        8,
        Paper(
            (0.530, 0.125, 0.300),
            (0.795, 10.0, 2.06),
            (0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5, 0.5625, 0.625),
            (100, 100, 100, 98.1, 95.2, 95.7, 96, 84, 58.6),
            (90, 81.9, 71, 58.1, 44.5, 38.1, 31.9, 23.6, 21),
        ),
    ),
)
