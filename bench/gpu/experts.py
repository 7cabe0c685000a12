"""How close a layer's experts are to what the GPU can do.

The gate, up and down products of all experts that a worker holds (`model.gpu.experts.GpuGrouped`),
for tokens that pick theirs at random. The floor of a step is what takes longer: reading the
matrices of the experts that were picked once, with the rows that go in and come out, or computing
the products. Steps of few tokens are bound by the reading, large ones by the products.

Each run goes through several draws of who picks whom, so that matrices come from memory and not
from the cache, in a CUDA graph on a GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench.gpu.attention import Ceilings
from bench.gpu.measure import graphed, median_s
from nodeserve.model.expert_parts import Mlp
from nodeserve.model.gpu.experts import GpuGrouped


@dataclass(frozen=True, slots=True)
class Experts:
    """A layer's, as far as they are on one worker."""

    name: str
    num_experts: int  # of the layer
    num_held: int  # on this worker
    num_picked: int  # by a token
    hidden: int
    inner: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.inner * self.dtype.itemsize


MODELS = (
    Experts("DeepSeek-V2-Lite", 64, 64, 6, 2048, 1408),
    Experts("Mixtral 8x7B", 8, 8, 2, 4096, 14336),
    Experts("DeepSeek-V3, one of ep8", 256, 32, 8, 7168, 2048),
)
TOKENS = (1, 8, 64, 256, 2048, 8192)  # of all ranks that share the experts
NUM_DRAWS = 8


@dataclass(frozen=True, slots=True)
class Row:
    """The experts of one step."""

    experts: Experts
    num_tokens: int
    num_rows: int  # tokens times experts that they picked here, on average over the draws
    us: float  # a layer
    floor_us: float
    reading: bool  # whether its floor is the reading

    @property
    def share(self) -> float:
        return self.floor_us / self.us


def draw_counts(experts: Experts, num_tokens: int, seed: int) -> torch.Tensor:
    """[num_held] int64: rows of each expert that is here, when every token picks at random."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, experts.num_experts, generator=draw)
    picked = scores.topk(experts.num_picked, dim=1).indices.flatten()
    return torch.bincount(picked, minlength=experts.num_experts)[: experts.num_held]


def visible_bytes(experts: Experts, counts: torch.Tensor) -> int:
    """What has to be read and written: picked matrices, rows in and out, and between the two
    products gate and up written and read, their product written and read."""
    matrices = int((counts > 0).sum()) * experts.expert_bytes
    row = (2 * experts.hidden + 6 * experts.inner) * experts.dtype.itemsize
    return matrices + int(counts.sum()) * row


def visible_flops(experts: Experts, counts: torch.Tensor) -> int:
    """Multiplications and additions of the three products."""
    return 2 * 3 * experts.hidden * experts.inner * int(counts.sum())


def floor_us(experts: Experts, counts: torch.Tensor, ceilings: Ceilings) -> tuple[float, bool]:
    """What a layer takes at the least, and whether it is the reading that does."""
    reading = visible_bytes(experts, counts) / ceilings.copy_gb_s / 1e3
    computing = visible_flops(experts, counts) / ceilings.product_tflop_s / 1e6
    return max(reading, computing), reading >= computing


def random_experts(experts: Experts, device: torch.device) -> GpuGrouped:
    """Random matrices: on zeros a GPU is faster than it ever will be on a model."""
    shape = (experts.inner, experts.hidden)
    scale = experts.hidden**-0.5

    def mlp(place: int) -> Mlp:
        made = (torch.empty(shape, dtype=experts.dtype, device=device) for _ in range(3))
        gate, up, down = (one.normal_(0.0, scale) for one in made)
        return Mlp(gate, up, down.view(shape[::-1]))

    return GpuGrouped(experts.num_held, mlp, experts.dtype, device)


class Work:
    """The experts of a step, once for each draw."""

    def __init__(
        self, experts: Experts, grouped: GpuGrouped, num_tokens: int, device: torch.device
    ) -> None:
        self._grouped = grouped
        self.counts = [draw_counts(experts, num_tokens, seed) for seed in range(NUM_DRAWS)]
        self._on_device = [one.to(device) for one in self.counts]
        most = max(int(one.sum()) for one in self.counts)
        self._x = torch.empty(most, experts.hidden, dtype=experts.dtype, device=device).normal_()
        self.out: list[torch.Tensor] = []

    def run(self) -> None:
        self.out = [
            self._grouped(self._x[: int(counts.sum())], on_device)
            for counts, on_device in zip(self.counts, self._on_device, strict=True)
        ]


def bench(
    device: torch.device,
    ceilings: Ceilings,
    models: tuple[Experts, ...] = MODELS,
    tokens: tuple[int, ...] = TOKENS,
    repeats: int = 10,
) -> Iterator[Row]:
    for experts in models:
        grouped = random_experts(experts, device)
        for num_tokens in tokens:
            yield _row(experts, grouped, num_tokens, device, ceilings, repeats)


def _row(
    experts: Experts,
    grouped: GpuGrouped,
    num_tokens: int,
    device: torch.device,
    ceilings: Ceilings,
    repeats: int,
) -> Row:
    work = Work(experts, grouped, num_tokens, device)
    run = graphed(work.run, device)
    us = 1e6 * median_s(run, device, repeats, warm=1) / NUM_DRAWS
    floors = [floor_us(experts, counts, ceilings) for counts in work.counts]
    num_rows = sum(int(counts.sum()) for counts in work.counts) // NUM_DRAWS
    reading = sum(by_reading for _, by_reading in floors) > NUM_DRAWS // 2
    return Row(experts, num_tokens, num_rows, us, sum(us for us, _ in floors) / NUM_DRAWS, reading)
