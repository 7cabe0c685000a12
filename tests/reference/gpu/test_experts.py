"""The experts' kernel against plain torch, and sparse layers and OPT on GPU operations."""

from pathlib import Path

import pytest
import torch

from nodeserve.model import families, kv
from nodeserve.model.expert_parts import Mlp
from nodeserve.model.experts import one_by_one
from nodeserve.model.gpu import experts
from nodeserve.model.gpu.ops import CudaOps
from nodeserve.model.loader import open_weights
from nodeserve.model.ops_torch import TorchOps
from tests.reference import hub
from tests.reference.gpu.plain import PlainAttention
from tests.reference.steps import BLOCK_SIZE, whole_prompts

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
IN_EACH_DTYPE = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
COUNTS = {
    "some-empty": [0, 3, 0, 17, 1, 0],
    "one-has-all": [0, 0, 40],
    "none": [0, 0, 0],
    "tiles-full-and-not": [16, 32, 15, 33],
    "alone": [5],
}


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@IN_EACH_DTYPE
@pytest.mark.parametrize("counts", COUNTS.values(), ids=list(COUNTS))
@pytest.mark.parametrize("shape", [(24, 40), (130, 70)], ids=str)
def test_each_group_is_multiplied_by_its_own_matrix(
    device: torch.device, dtype: torch.dtype, counts: list[int], shape: tuple[int, int]
) -> None:
    width, depth = shape
    x = _random(sum(counts), depth, seed=1).to(device, dtype)
    weight = _random(len(counts), width, depth, seed=2).to(device, dtype)
    out = torch.full((sum(counts), width), torch.nan, dtype=dtype, device=device)
    experts.grouped_linear(x, weight, torch.tensor(counts, device=device), out)
    parts = torch.split(x.float(), counts)
    wanted = torch.cat([part @ one.float().t() for part, one in zip(parts, weight, strict=True)])
    torch.testing.assert_close(
        out.float(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * depth**0.5
    )


@pytest.mark.parametrize("rows", [1, 16, 100, 10_000])
def test_all_rows_of_all_tile_sizes_fit_into_the_grid(rows: int) -> None:
    for num_groups in (1, 2, 7, 256):
        tile = experts.rows_of_a_tile(rows, num_groups)
        assert tile in (16, 32, 64, 128)
        uneven = [rows // num_groups + (group < rows % num_groups) for group in range(num_groups)]
        for counts in (uneven, [1] * min(rows, num_groups), [rows]):
            tiles = sum(-(-count // tile) for count in counts)
            assert tiles <= rows // tile + min(num_groups, rows)


@IN_EACH_DTYPE
def test_gated_experts_equal_plain_torch(device: torch.device, dtype: torch.dtype) -> None:
    counts = torch.tensor([2, 0, 20, 1])

    def mlp(place: int) -> Mlp:
        gate, up, down = (_random(48, 40, seed=3 * place + one) * 0.2 for one in range(3))
        return Mlp(gate.to(dtype), up.to(dtype), down.t().contiguous().to(dtype))

    x = _random(23, 40, seed=99).to(dtype)
    wanted = one_by_one(TorchOps(dtype), 4, mlp)(x, counts)
    ours = experts.GpuGrouped(4, mlp, dtype, device)(x.to(device), counts.to(device))
    assert (ours.float().cpu() - wanted).abs().max() < 4 * TOLERANCE[dtype] * wanted.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("family", hub.SETTINGS)
def test_families_equal_plain_torch(device: torch.device, family: str, tmp_path: Path) -> None:
    hub.write(family, tmp_path)
    checkpoint = hub.checkpoint_in(tmp_path)
    config, weights = checkpoint.config, open_weights(checkpoint, torch.float32)
    layout = kv.layout_of(config, BLOCK_SIZE, torch.float32)
    results = []
    for ops in (TorchOps(torch.float32), CudaOps(torch.float32, device, PlainAttention())):
        model = families.build(config, weights, ops)
        pool = torch.zeros(8 * layout.block_bytes, dtype=torch.uint8, device=ops.device)
        inputs = whole_prompts([[3], [(7 * i * i) % 211 for i in range(20)], list(range(7))])
        results.append(model.forward(inputs.to(ops.device), ops.cache(layout, pool)).cpu())
    assert (results[1] - results[0]).abs().max() < 3e-5 * results[0].abs().max()
