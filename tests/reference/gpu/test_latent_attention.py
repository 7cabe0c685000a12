"""The kernels over latents against plain torch, and the decoder that is made of them."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from nodeserve.config import MlaConfig, ModelConfig
from nodeserve.errors import ConfigError
from nodeserve.model import families, kv
from nodeserve.model.dummy import DummyWeights
from nodeserve.model.gpu.attention.case import TOLERANCE
from nodeserve.model.gpu.attention.latent_choice import (
    make_latent_attention,
    make_latent_case,
    refusal,
)
from nodeserve.model.gpu.attention.latent_parts import (
    LatentDecode,
    LatentHeads,
    LatentPrefill,
    LatentTiles,
    heads_in_block,
    latent_heads_of,
)
from nodeserve.model.gpu.attention.paged import PagedAttention
from nodeserve.model.gpu.ops import CudaOps
from nodeserve.model.ops_torch import TorchOps
from tests.reference.driver import Driver

RAGGED = [(1, 1), (1, 16), (1, 17), (1, 90), (15, 15), (17, 40), (2, 80)]
SMALL = LatentHeads(6, 32, 16, 0.2, 16, torch.float32)


def triton_backend(
    heads: LatentHeads,
    device: torch.device,
    num_sms: int = 2,
    capability: tuple[int, int] = (9, 0),
) -> PagedAttention:
    decode = LatentDecode(heads, device, num_sms, capability)
    return PagedAttention(decode, LatentPrefill(heads, capability), "triton")


def check(
    heads: LatentHeads,
    lengths: Sequence[tuple[int, int]],
    device: torch.device,
    num_sms: int = 2,
    capability: tuple[int, int] = (9, 0),
) -> None:
    case = make_latent_case(heads, lengths, device)
    backend = triton_backend(heads, device, num_sms, capability)
    assert case.error(backend) < TOLERANCE[heads.dtype]


@pytest.mark.parametrize("num_heads", [1, 3, 16, 17, 24, 40])
def test_blocks_of_heads(num_heads: int, device: torch.device) -> None:
    """Fewer than a tile has rows, as many, and blocks that divide what is more."""
    check(replace(SMALL, num_heads=num_heads), [(1, 20), (1, 3), (19, 37)], device)


@pytest.mark.parametrize(("rank", "turned"), [(16, 8), (48, 16), (64, 32), (96, 64), (512, 64)])
def test_sizes_of_latents(rank: int, turned: int, device: torch.device) -> None:
    check(replace(SMALL, rank=rank, turned=turned), [(1, 40), (1, 1), (9, 30)], device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_heads", [6, 48])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_types(
    dtype: torch.dtype, num_heads: int, capability: tuple[int, int], device: torch.device
) -> None:
    heads = replace(SMALL, dtype=dtype, num_heads=num_heads)
    check(heads, [(1, 90), (1, 1), (30, 50)], device, capability=capability)


@pytest.mark.parametrize("block_size", [8, 16, 48, 64])
def test_block_sizes(block_size: int, device: torch.device) -> None:
    check(replace(SMALL, block_size=block_size), RAGGED, device)


@pytest.mark.parametrize("context", [1, 15, 16, 17, 33, 200])
def test_contexts_that_are_split(context: int, device: torch.device) -> None:
    check(SMALL, [(1, context), (1, 1), (1, 0)], device, num_sms=8)


def test_a_program_takes_as_many_heads_as_divide_them_all() -> None:
    tiles = (LatentTiles(16, 32, 4, 2, 1), LatentTiles(64, 32, 8, 2, 1))
    found = {heads: heads_in_block(heads, tiles) for heads in (1, 16, 48, 64, 128, 24, 96, 67)}
    assert found == {1: 1, 16: 16, 48: 48, 64: 64, 128: 64, 24: 24, 96: 48, 67: 1}


@pytest.mark.slow
def test_the_choice_says_why_not(device: torch.device) -> None:
    assert make_latent_attention(SMALL, device).name == "triton"
    assert make_latent_attention(SMALL, device, "reference").name == "reference"
    with pytest.raises(ConfigError, match="flash-attn reads keys and values"):
        make_latent_attention(SMALL, device, "flash-attn")
    with pytest.raises(ConfigError, match="attention backend fast is unknown"):
        make_latent_attention(SMALL, device, "fast")
    large = replace(SMALL, rank=1024)
    with pytest.raises(ConfigError, match="takes latents up to 512"):
        make_latent_attention(large, device, "triton")
    assert make_latent_attention(large, device).name.startswith("reference (triton: takes latents")
    assert "compute capability 8.0, the device has 7.5" in str(refusal(SMALL, (7, 5)))


MODEL = ModelConfig(
    architecture="deepseek_v3",
    vocab_size=211,
    hidden_size=96,
    intermediate_size=200,
    num_layers=2,
    num_heads=6,
    num_kv_heads=1,
    head_dim=48,
    max_position=256,
    norm_eps=1e-5,
    rope_theta=10000.0,
    mla=MlaConfig(64, 40, 32, 16, 24, 48**-0.5),
)


@pytest.mark.slow
@pytest.mark.parametrize(("interleaved", "rank"), [(True, 40), (False, None)])
def test_a_decoder_with_its_kernels(
    interleaved: bool, rank: int | None, device: torch.device
) -> None:
    """Chunked prompts beside decodes; every operation of the GPU's but graphs."""
    assert MODEL.mla is not None
    mla = replace(MODEL.mla, rope_interleaved=interleaved, q_lora_rank=rank)
    config = replace(MODEL, mla=mla)
    heads = latent_heads_of(config, 16, torch.float32)
    ops = CudaOps(torch.float32, device, triton_backend(heads, device))
    prompts = [[(7 * i * i + n) % 211 for i in range(n)] for n in (1, 20, 9)]
    drivers = []
    for one in (TorchOps(torch.float32), ops):
        weights = DummyWeights(config, torch.float32)
        model = families.build(config, weights, one)
        drivers.append(Driver(model, one, kv.layout_of(config, 16, torch.float32)))
    theirs, mine = (torch.cat(driver.whole(prompts)) for driver in drivers)
    assert (mine - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert drivers[1].greedy(prompts, 2, chunk=13) == drivers[0].greedy(prompts, 2, chunk=64)
