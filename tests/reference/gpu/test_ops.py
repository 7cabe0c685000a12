"""Each kernel around the matrix products against plain torch."""

import numpy
import pytest
import torch
from torch.nn import functional

from nodeserve.config import ModelConfig
from nodeserve.errors import ModelError
from nodeserve.model import kv, rotary
from nodeserve.model.gpu import norm, pointwise, rope
from nodeserve.model.gpu.ops import CudaOps
from nodeserve.model.ops_torch import TorchOps
from tests.reference.gpu.plain import PlainAttention, config_of, step_of

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
IN_EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Up to one rounding of the result's type."""
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours.float().cpu(), theirs.float(), rtol=tolerance, atol=tolerance)


# -- rows -----------------------------------------------------------------------------------------


@IN_EACH_DTYPE
@pytest.mark.parametrize("width", [1, 64, 77, 576, 3584])
def test_add_and_norm(device: torch.device, dtype: torch.dtype, width: int) -> None:
    hidden, delta = _random(5, width) * 3, _random(5, width, seed=1, dtype=dtype)
    weight, normed = _random(width, seed=2), torch.empty(5, width, dtype=dtype, device=device)
    ours = hidden.clone().to(device)
    norm.rms_norm(ours, weight.to(device), normed, 1e-5)
    assert torch.equal(ours.cpu(), hidden)
    _assert_close(normed, functional.rms_norm(hidden, (width,), weight, 1e-5))
    norm.add_rms_norm(delta.to(device), ours, weight.to(device), normed, 1e-2)
    assert torch.equal(ours.cpu(), hidden + delta)
    _assert_close(normed, functional.rms_norm(hidden + delta, (width,), weight, 1e-2))


@IN_EACH_DTYPE
@pytest.mark.parametrize("width", [7, 1024, 1100])
def test_gated_activation(device: torch.device, dtype: torch.dtype, width: int) -> None:
    gate_up = (_random(4, 2 * width) * 4).to(dtype)
    gate_up[0, 0], gate_up[0, 1] = -200.0, 200.0  # where an exponential overflows
    out = torch.empty(4, width, dtype=dtype, device=device)
    with numpy.errstate(over="ignore"):  # infinity is the right value there
        pointwise.silu_mul(gate_up.to(device), out)
    gate, up = gate_up.float().chunk(2, -1)
    _assert_close(out, functional.silu(gate) * up)


@IN_EACH_DTYPE
def test_embedding(device: torch.device, dtype: torch.dtype) -> None:
    table = _random(50, 1030, dtype=dtype)
    token_ids = torch.tensor([0, 49, 7, 7, 50, -1], dtype=torch.int32)
    out = torch.full((6, 1030), torch.nan, device=device)
    pointwise.embedding(token_ids.to(device), table.to(device), out)
    assert torch.equal(out[:4].cpu(), table.float()[token_ids[:4]])
    assert not out[4:].any(), "a token outside the vocabulary reads no foreign memory"


def test_only_fed_tokens_change(device: torch.device) -> None:
    token_ids = torch.arange(1500, dtype=torch.int32)
    sampled = torch.randint(0, 9000, (64,), dtype=torch.int32)
    feed = torch.randint(-3, 64, (1500,), dtype=torch.int32)
    wanted = torch.where(feed >= 0, sampled[feed.clamp(min=0)], token_ids)
    ours = token_ids.to(device)
    pointwise.feed_tokens(ours, feed.to(device), sampled.to(device))
    assert torch.equal(ours.cpu(), wanted)


# -- rotation and pages ---------------------------------------------------------------------------

GEOMETRIES = [
    config_of(2, 2, head_dim=64),
    config_of(9, 3, head_dim=64),
    config_of(4, 1, head_dim=80, qk_norm=True),
    config_of(32, 8, head_dim=128),
    config_of(8, 2, head_dim=128, qk_norm=True),
    config_of(2, 1, head_dim=256, qk_norm=True),
    config_of(5, 1, head_dim=16),
]


TYPED = [(geometry, torch.bfloat16) for geometry in GEOMETRIES]
TYPED += [(GEOMETRIES[1], torch.float16), (GEOMETRIES[2], torch.float32)]


def _geometry(config: ModelConfig) -> str:
    kind = "-normed" if config.qk_norm else ""
    return f"{config.num_heads}of{config.num_kv_heads}x{config.head_dim}{kind}"


def _named(value: object) -> str:
    return _geometry(value) if isinstance(value, ModelConfig) else str(value)


@pytest.mark.parametrize(("config", "dtype"), TYPED, ids=_named)
def test_queries_turn_and_pages_fill(
    device: torch.device, config: ModelConfig, dtype: torch.dtype
) -> None:
    """A decode, a chunk over two page boundaries, one that ends at a boundary, and pad rows."""
    spans = [(4, 5), (3, 9), (0, 4), (0, 1), (0, 1)]
    blocks = [[3, 6], [5, 1, 2], [7], [9], [-1]]
    inputs = step_of(spans, blocks, [[0] * 9] * 5, 4)
    layout = kv.layout_of(config, 4, dtype)
    num_all = config.num_heads + 2 * config.num_kv_heads
    qkv = _random(inputs.positions.numel(), num_all * config.head_dim, dtype=dtype)
    norms = None
    if config.qk_norm:
        norms = (_random(config.head_dim, seed=8), _random(config.head_dim, seed=9))
    judge, ours = TorchOps(dtype), CudaOps(dtype, device, PlainAttention())
    queries, pools = [], []
    for ops in (judge, ours):
        pool = torch.full((10 * layout.block_bytes,), 0x3C, dtype=torch.uint8, device=ops.device)
        cache = ops.cache(layout, pool)
        query = torch.empty(len(qkv), config.num_heads * config.head_dim, dtype=dtype)
        query = query.to(ops.device)
        attention = ops.attention(config, 1, rotary.tables(config), norms)
        begun = ops.begin(inputs.to(ops.device), cache)  # type: ignore[arg-type]
        source = qkv.to(ops.device, ops.qkv_dtype)
        attention.store(begun, source, query)  # type: ignore[arg-type]
        queries.append(query)
        pools.append(cache.pages)
    _assert_close(queries[1], queries[0])
    # The judge takes -1 as the last block, which ours leaves alone: it is 9, the scratch block.
    _assert_close(pools[1][:9], pools[0][:9])
    untouched = [0, 4, 8]
    assert torch.equal(pools[1][untouched].cpu(), pools[0][untouched])
    assert torch.equal(pools[1][:, 0].cpu(), pools[0][:, 0]), "another layer's pages"


@pytest.mark.parametrize("block_size", [8, 16, 64])
def test_slots(device: torch.device, block_size: int) -> None:
    spans = [(0, 1), (700, 701), (3, 3 + 1200), (64, 128)]
    blocks = [[*range(seq * 200, seq * 200 + 160)] for seq in range(4)]
    blocks[3][64 // block_size] = -1
    inputs = step_of(spans, blocks, [[0] * 1300] * 4, block_size).to(device)
    slots = torch.full_like(inputs.positions, -9)
    rope.find_slots(
        inputs.query_starts, inputs.positions, inputs.block_table, slots, 1200, block_size
    )
    places = [(seq, p) for seq, (first, last) in enumerate(spans) for p in range(first, last)]
    wanted = [
        -1 if (block := blocks[seq][p // block_size]) < 0 else block * block_size + p % block_size
        for seq, p in places
    ]
    assert slots.tolist() == wanted


# -- what is refused ------------------------------------------------------------------------------


def test_a_type_without_kernels_is_refused(device: torch.device) -> None:
    with pytest.raises(ModelError, match=r"float64.*bfloat16"):
        CudaOps(torch.float64, device, PlainAttention())


def test_pages_of_another_type_are_refused(device: torch.device) -> None:
    ops = CudaOps(torch.float16, device, PlainAttention())
    layout = kv.layout_of(config_of(), 16, torch.bfloat16)
    with pytest.raises(ModelError, match=r"pages are torch.bfloat16"):
        ops.cache(layout, torch.zeros(layout.block_bytes, dtype=torch.uint8, device=device))


def test_torch_has_the_product_with_float32_results() -> None:
    """CudaOps calls it by this name on GPUs; a CPU has the name but no code behind it."""
    assert "out_dtype" in str(torch.ops.aten.mm.dtype_out._schema)
