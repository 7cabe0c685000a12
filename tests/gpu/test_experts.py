"""The experts' kernel on a GPU at the sizes of models, against plain torch, and in graphs."""

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need triton")

from nodeserve.model.gpu.experts import grouped_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Groups, columns and depth: DeepSeek-V2-Lite's two products, and one of Mixtral's.
SHAPES = [(64, 2816, 2048), (64, 2048, 1408), (8, 4096, 14336)]
CUDA = torch.device("cuda")


def random_counts(num_groups: int, num_rows: int, seed: int) -> torch.Tensor:
    """[num_groups] int64: most rows go to few groups, and some groups have none."""
    draw = torch.Generator().manual_seed(seed)
    weights = torch.rand(num_groups, generator=draw) ** 4
    groups = torch.multinomial(weights, num_rows, replacement=True, generator=draw)
    return torch.bincount(groups, minlength=num_groups)


def wanted(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    parts = torch.split(x, counts.tolist())
    return torch.cat([part @ one.t() for part, one in zip(parts, weight, strict=True)]).float()


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device=CUDA).to(dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_tile_size(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    num_groups, width, depth = shape
    weight = random(*shape, dtype=dtype) * depth**-0.5
    for num_rows in (1, 6, 96, 1536, 12_288):
        counts = random_counts(num_groups, num_rows, seed=num_rows)
        x = random(num_rows, depth, dtype=dtype)
        out = torch.full((num_rows, width), torch.nan, dtype=dtype, device=CUDA)
        grouped_linear(x, weight, counts.to(CUDA), out)
        distance = (out.float() - wanted(x, weight, counts)).abs().max()
        assert float(distance) < 4 * TOLERANCE[dtype]


def test_a_captured_product_fits_other_counts() -> None:
    """Captured with all rows in one group, replayed with others: the counts stay on the device."""
    num_groups, width, depth, num_rows = 64, 2816, 2048, 96
    weight = random(num_groups, width, depth, dtype=torch.bfloat16) * depth**-0.5
    x = random(num_rows, depth, dtype=torch.bfloat16)
    out = torch.empty(num_rows, width, dtype=torch.bfloat16, device=CUDA)
    counts = torch.zeros(num_groups, dtype=torch.int64, device=CUDA)
    counts[7] = num_rows
    grouped_linear(x, weight, counts, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grouped_linear(x, weight, counts, out)
    for seed in range(4):
        drawn = random_counts(num_groups, num_rows, seed)
        counts.copy_(drawn)
        out.fill_(torch.nan)
        graph.replay()
        distance = (out.float() - wanted(x, weight, drawn)).abs().max()
        assert float(distance) < 4 * TOLERANCE[torch.bfloat16]
