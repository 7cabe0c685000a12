"""Kernels at the sizes of an 8B model, on a GPU; on a CPU the same tests at small ones."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from nodeserve.config import ModelConfig
from nodeserve.model import kv, rotary
from nodeserve.model.gpu import norm, pointwise
from nodeserve.model.gpu.ops import CudaOps
from nodeserve.worker.sampler import sample
from nodeserve.worker.sampler_gpu import GpuSampler
from tests.reference.gpu.plain import PlainAttention, config_of, step_of
from tests.reference.test_sampler import random_logits, sequence_of

# As two norms: a fast kernel rounds to 16 bits once or twice, a wrong one is far off.
TOLERANCE = 8e-3


def sized(device: torch.device, large: int, small: int) -> int:
    return large if device.type == "cuda" else small


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """|ours - theirs| / |theirs| in float64; NaN stays NaN."""
    wanted = theirs.double().to(ours.device)
    return float((ours.double() - wanted).norm() / wanted.norm())


def random(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(3)
    return torch.randn(*shape, generator=generator, device=device).to(dtype)


def test_add_and_norm(device: torch.device) -> None:
    rows, width = sized(device, 8192, 3), sized(device, 4096, 130)
    hidden = random(device, rows, width)
    delta = random(device, rows, width, dtype=torch.bfloat16).roll(1)
    weight = random(device, width)
    wanted = hidden.double() + delta.double()
    normed = torch.full((rows, width), torch.nan, dtype=torch.bfloat16, device=device)
    norm.add_rms_norm(delta, hidden, weight, normed, 1e-5)
    assert distance(hidden, wanted) < 1e-6
    assert (
        distance(normed, functional.rms_norm(wanted, (width,), weight.double(), 1e-5)) < TOLERANCE
    )


def test_gated_activation(device: torch.device) -> None:
    rows, width = sized(device, 4096, 2), sized(device, 14336, 70)
    gate_up = random(device, rows, 2 * width, dtype=torch.bfloat16)
    out = torch.full((rows, width), torch.nan, dtype=torch.bfloat16, device=device)
    pointwise.silu_mul(gate_up, out)
    gate, up = gate_up.double().chunk(2, -1)
    assert distance(out, functional.silu(gate) * up) < TOLERANCE


def wide(device: torch.device) -> ModelConfig:
    heads, kv_heads = sized(device, 32, 4), sized(device, 8, 2)
    return config_of(heads, kv_heads, head_dim=128, max_position=sized(device, 131072, 256))


def test_pages_near_the_end_of_a_long_context(device: torch.device) -> None:
    """The last tokens of a full context, where the angles are largest and the table longest."""
    config, count = wide(device), 40
    last, num_blocks = config.max_position, config.max_position // 16
    blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
    inputs = step_of([(last - count, last)], [blocks], [[0] * count], 16)
    there: dict[str, Any] = {
        field.name: getattr(inputs, field.name).to(device)
        for field in fields(inputs)
        if isinstance(getattr(inputs, field.name), torch.Tensor)
    }
    inputs = replace(inputs, **there)
    ops = CudaOps(torch.bfloat16, device, PlainAttention())
    layout = kv.layout_of(config, 16, torch.bfloat16)
    pool = torch.zeros(num_blocks * layout.block_bytes, dtype=torch.uint8, device=device)
    cache = ops.cache(layout, pool)
    tables = rotary.tables(config)
    num_all = config.num_heads + 2 * config.num_kv_heads
    qkv = random(device, count, num_all * 128, dtype=torch.bfloat16)
    query = torch.empty(count, config.num_heads * 128, dtype=torch.bfloat16, device=device)
    layer = config.num_layers - 1
    ops.attention(config, layer, tables, None).store(ops.begin(inputs, cache), qkv, query)

    heads = qkv.double().view(count, num_all, 128)
    turned = rotate(heads, torch.arange(last - count, last), config.rope_theta)
    ends = (config.num_heads, config.num_heads + config.num_kv_heads)
    assert distance(query.view(count, -1, 128), turned[:, : ends[0]]) < TOLERANCE
    at = torch.arange(last - count, last)
    held = cache.layers[layer][torch.tensor(blocks)[at // 16].to(device), :, :, at % 16]
    assert distance(held[:, 0], turned[:, ends[0] : ends[1]]) < TOLERANCE
    assert torch.equal(held[:, 1], qkv.view(count, num_all, 128)[:, ends[1] :])
    assert int((pool != 0).sum()) <= count * 2 * config.num_kv_heads * 128 * 2, "and no others"


def rotate(heads: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """The rotation in float64, halves against halves. heads [tokens, heads, head_dim]"""
    half = heads.size(-1) // 2
    steps = torch.arange(half, dtype=torch.float64) / half
    angles = (positions.double()[:, None] * theta**-steps).to(heads.device)[:, None]
    left, right = heads[..., :half], heads[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_logits_are_not_rounded_to_16_bits(device: torch.device, rows: int) -> None:
    vocab, width = sized(device, 128256, 300), sized(device, 4096, 64)
    x = random(device, rows, width, dtype=torch.bfloat16)
    weight = random(device, vocab, width, dtype=torch.bfloat16) * width**-0.5
    ops = CudaOps(torch.bfloat16, device, PlainAttention())
    op = ops.linear(weight)
    ops.reserve(rows, rows, 16)
    out = torch.full((rows, vocab), torch.nan, dtype=torch.float32, device=device)
    op(x, out)
    # On a CPU the product itself is rounded: there this only shows that the test is right.
    limit = 1e-4 if device.type == "cuda" else TOLERANCE
    assert distance(out, x.double() @ weight.double().t()) < limit


def test_the_tokens_of_the_cpu_sampler(device: torch.device) -> None:
    """Greedy and drawn rows of a full vocabulary; a drawn one may differ at a share's very edge."""
    count, vocab = sized(device, 64, 6), sized(device, 128256, 700)
    requests = [
        sequence_of(temperature=0.0) if row % 3 == 0 else sequence_of(seed=row, top_p=0.9)
        for row in range(count)
    ]
    logits = random_logits(count, seed=4, vocab=vocab)
    wanted = sample(logits.clone(), requests).token_ids
    for one in requests:
        one.device_state = None
    launched = GpuSampler(device, count).launch(logits.to(device), requests)
    if device.type == "cuda":
        torch.cuda.synchronize()
    found = launched.result().token_ids
    assert found[::3] == wanted[::3], "the most likely token has no edge"
    assert sum(a != b for a, b in zip(found, wanted, strict=True)) <= count // 32
