"""Families beside Llama's: a folder as the hub has it, read by us, against transformers."""

from pathlib import Path

import pytest
import torch

from nodeserve.checkpoint import Checkpoint
from nodeserve.model import families, kv
from nodeserve.model.backend import make_ops
from nodeserve.model.dummy import DummyWeights
from nodeserve.model.loader import open_weights
from nodeserve.model.ops import Ops
from nodeserve.model.ops_cpu import CpuOps
from nodeserve.model.ops_torch import TorchOps
from tests.reference import hub
from tests.reference.steps import BLOCK_SIZE, NUM_BLOCKS, Steps, in_steps, whole_prompts

PROMPTS = [[3], [(7 * i * i) % 211 for i in range(90)], list(range(17))]
IN_EACH_FAMILY = pytest.mark.parametrize("family", hub.SETTINGS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


def _logits(checkpoint: Checkpoint, ops: Ops) -> torch.Tensor:
    model = families.build(checkpoint.config, open_weights(checkpoint, ops.dtype), ops)
    layout = kv.layout_of(checkpoint.config, BLOCK_SIZE, ops.dtype)
    cache = ops.cache(layout, torch.zeros(NUM_BLOCKS * layout.block_bytes, dtype=torch.uint8))
    return model.forward(whole_prompts(PROMPTS), cache).clone()


@IN_EACH_FAMILY
def test_float32_logits_equal_transformers(family: str, folder: Path) -> None:
    theirs = hub.logits_of(hub.write(family, folder), PROMPTS)
    checkpoint = hub.checkpoint_in(folder)
    for ops in (make_ops(checkpoint.config, torch.float32), TorchOps(torch.float32)):
        assert (_logits(checkpoint, ops) - theirs).abs().max() < 1e-4


@IN_EACH_FAMILY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_native_agrees_with_torch(family: str, dtype: torch.dtype, folder: Path) -> None:
    """But for the few rows that another rounding sends to another expert."""
    hub.write(family, folder)
    checkpoint = hub.checkpoint_in(folder)
    native = _logits(checkpoint, CpuOps(checkpoint.config, dtype))
    plain = _logits(checkpoint, TorchOps(dtype))
    tolerance = {torch.float16: 0.01, torch.bfloat16: 0.1}[dtype]
    far = (native - plain).abs().amax(1) > tolerance * plain.abs().max().clamp(min=1.0)
    assert far.float().mean() < 0.1


@IN_EACH_FAMILY
def test_logits_have_the_same_bits_alone_batched_chunked_and_threaded(
    family: str, folder: Path
) -> None:
    hub.write(family, folder)
    checkpoint = hub.checkpoint_in(folder)
    config, weights = checkpoint.config, open_weights(checkpoint, torch.bfloat16)
    whole: Steps = [{p: (0, n) for p, n in enumerate((61, 7, 130))}]
    cut: Steps = [{0: (0, 33), 2: (0, 1)}, {2: (1, 100)}, {1: (0, 7), 0: (33, 61), 2: (100, 130)}]
    results = []
    for num_threads in (1, 2):
        ops = CpuOps(config, torch.bfloat16, num_threads)
        model = families.build(config, weights, ops)
        results += [torch.cat(in_steps(config, ops, model, steps)) for steps in (whole, cut)]
    assert all(torch.equal(result, results[0]) for result in results)


@IN_EACH_FAMILY
def test_every_tensor_of_the_file_has_its_shape_and_is_asked_for_once(
    family: str, folder: Path
) -> None:
    model = hub.write(family, folder)
    checkpoint = hub.checkpoint_in(folder)
    config, weights = checkpoint.config, open_weights(checkpoint, torch.float32)
    asked: list[str] = []

    def get(name: str) -> torch.Tensor:
        asked.append(name)
        return weights(name)

    families.build(config, get, TorchOps(torch.float32))
    in_file = set(weights._places)  # type: ignore[attr-defined]
    assert sorted(asked) == sorted(in_file)
    dummy = DummyWeights(config, torch.float32)
    assert all(dummy(name).shape == weights(name).shape for name in in_file)
    matrices = sum(weights(name).numel() for name in in_file if weights(name).dim() == 2)
    assert config.num_weights == pytest.approx(matrices, rel=2e-3)
    assert config.num_weights <= sum(one.numel() for one in model.parameters())


@IN_EACH_FAMILY
def test_a_tensor_of_another_shape_is_refused_by_name(family: str, folder: Path) -> None:
    hub.write(family, folder)
    config = hub.checkpoint_in(folder).config
    unknown = ["lm_head.bias", "model.layers.3.input_layernorm.weight", "model.layers.x.fc1.weight"]
    unknown += ["model.layers.0.mlp.experts.8.up_proj.weight", "model.layers.0.mlp.nothing.weight"]
    assert [families.shape_of(config, name) for name in unknown] == [None] * len(unknown)
