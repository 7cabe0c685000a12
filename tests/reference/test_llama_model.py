"""The decoder against transformers' own modules, and the native backend against plain torch."""

from dataclasses import replace

import pytest
import torch

from nodeserve.config import ModelConfig
from nodeserve.errors import ModelError
from nodeserve.model import families, kv
from nodeserve.model.backend import make_ops
from nodeserve.model.ops import Ops
from nodeserve.model.ops_cpu import CpuOps
from nodeserve.model.ops_torch import TorchOps
from tests.reference.steps import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    PROMPT_LENS,
    Steps,
    in_steps,
    whole_prompts,
)
from tests.reference.tiny_models import FAMILIES, SMALL, reference


def _logits(config: ModelConfig, state: dict[str, torch.Tensor], ops: Ops) -> torch.Tensor:
    layout = kv.layout_of(config, BLOCK_SIZE, ops.dtype)
    cache = ops.cache(layout, torch.zeros(NUM_BLOCKS * layout.block_bytes, dtype=torch.uint8))
    model = families.build(config, state.__getitem__, ops)
    return model.forward(whole_prompts(_prompts(config)), cache).clone()


def _prompts(config: ModelConfig) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(0, config.vocab_size, (count,), generator=generator).tolist()
        for count in (1, 90, 17)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_logits_equal_transformers(family: str) -> None:
    config = FAMILIES[family]
    model = reference(config)
    ours = _logits(config, model.state_dict(), make_ops(config, torch.float32))
    with torch.no_grad():
        theirs = [model(torch.tensor([prompt])).logits[0] for prompt in _prompts(config)]
    assert (ours - torch.cat(theirs)).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_native_agrees_with_torch(family: str, dtype: torch.dtype) -> None:
    config = FAMILIES[family]
    state = reference(config).state_dict()
    native = _logits(config, state, CpuOps(config, dtype))
    plain = _logits(config, state, TorchOps(dtype))
    tolerance = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.1}[dtype]
    assert (native - plain).abs().max() < tolerance * plain.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_have_the_same_bits_alone_batched_chunked_and_threaded(dtype: torch.dtype) -> None:
    state = reference(SMALL).state_dict()
    whole: Steps = [{p: (0, n) for p, n in enumerate(PROMPT_LENS)}]
    alone: Steps = [{p: (0, n)} for p, n in enumerate(PROMPT_LENS)]
    token_by_token: Steps = [
        {p: (at, at + 1) for p, n in enumerate(PROMPT_LENS) if at < n} for at in range(130)
    ]
    cut: Steps = [{0: (0, 33), 2: (0, 1)}, {2: (1, 100)}, {1: (0, 7), 0: (33, 61), 2: (100, 130)}]
    results = []
    for num_threads in (1, 2):
        ops = CpuOps(SMALL, dtype, num_threads)
        model = families.build(SMALL, state.__getitem__, ops)
        for steps in (whole, alone, token_by_token, cut):
            results.append(torch.cat(in_steps(SMALL, ops, model, steps)))
    assert all(torch.equal(result, results[0]) for result in results)


def test_only_the_wanted_rows_get_logits() -> None:
    state, ops = reference(SMALL).state_dict(), CpuOps(SMALL, torch.float32)
    layout = kv.layout_of(SMALL, BLOCK_SIZE, ops.dtype)
    cache = ops.cache(layout, torch.zeros(NUM_BLOCKS * layout.block_bytes, dtype=torch.uint8))
    model = families.build(SMALL, state.__getitem__, ops)
    inputs = whole_prompts([[1, 2, 3], [4, 5]])
    every = model.forward(inputs, cache).clone()
    some = replace(inputs, logit_rows=torch.tensor([4, 2], dtype=torch.int32))
    assert torch.equal(model.forward(some, cache), every[[4, 2]])
    none = replace(inputs, logit_rows=torch.tensor([], dtype=torch.int32))
    assert model.forward(none, cache).shape == (0, SMALL.vocab_size)


def test_geometry_that_the_kernels_refuse_runs_on_torch() -> None:
    assert isinstance(make_ops(replace(SMALL, head_dim=72), torch.float32), TorchOps)
    assert isinstance(make_ops(SMALL, torch.float32, block_size=8), TorchOps)


def test_unknown_architecture_names_the_supported_ones() -> None:
    config = replace(SMALL, architecture="gpt_neox")
    with pytest.raises(ModelError, match="gpt_neox.*llama, mistral, qwen2, qwen3"):
        families.build(config, dict[str, torch.Tensor]().__getitem__, TorchOps(torch.float32))
