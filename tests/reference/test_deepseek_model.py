"""DeepSeek's decoder against transformers' own modules, from checkpoints as the hub has them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from nodeserve.checkpoint import Checkpoint
from nodeserve.model import families, kv
from nodeserve.model.backend import make_ops
from nodeserve.model.dummy import DummyWeights
from nodeserve.model.loader import open_weights
from nodeserve.model.ops import Ops
from nodeserve.model.ops_cpu import CpuOps
from nodeserve.model.ops_torch import TorchOps
from tests.reference import deepseek
from tests.reference.driver import Driver
from tests.reference.steps import PROMPT_LENS, Steps, in_steps

pytestmark = pytest.mark.usefixtures("one_thread")

Made = tuple[transformers.PreTrainedModel, Checkpoint]
LENS = (1, 90, 17)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """A kind's model and its checkpoint, made once."""
    known: dict[str, Made] = {}

    def make(kind: str) -> Made:
        if kind not in known:
            model = deepseek.reference(kind)
            known[kind] = model, deepseek.saved(model, tmp_path_factory.mktemp(kind))
        return known[kind]

    return make


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, 211, (count,), generator=generator).tolist() for count in LENS]


def driver_of(checkpoint: Checkpoint, ops: Ops) -> Driver:
    weights = open_weights(checkpoint, ops.dtype)
    model = families.build(checkpoint.config, weights, ops)
    return Driver(model, ops, kv.layout_of(checkpoint.config, 16, ops.dtype))


def logits_of(checkpoint: Checkpoint, ops: Ops) -> torch.Tensor:
    return torch.cat(driver_of(checkpoint, ops).whole(prompts()))


@pytest.mark.parametrize("kind", deepseek.KINDS)
@pytest.mark.parametrize("native", [True, False])
def test_float32_logits_equal_transformers(
    kind: str, native: bool, made: Callable[[str], Made]
) -> None:
    model, checkpoint = made(kind)
    ops: Ops = TorchOps(torch.float32)
    if native:
        ops = make_ops(checkpoint.config, torch.float32)
        assert isinstance(ops, CpuOps)
    with torch.no_grad():
        theirs = [model(torch.tensor([prompt])).logits[0] for prompt in prompts()]
    assert (logits_of(checkpoint, ops) - torch.cat(theirs)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", deepseek.KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_native_agrees_with_torch(
    kind: str, dtype: torch.dtype, made: Callable[[str], Made]
) -> None:
    """Where rounding does not send a token to another expert: in nearly all rows."""
    _, checkpoint = made(kind)
    native = logits_of(checkpoint, CpuOps(checkpoint.config, dtype))
    plain = logits_of(checkpoint, TorchOps(dtype))
    tolerance = {torch.float16: 0.02, torch.bfloat16: 0.1}[dtype]
    apart = (native - plain).abs().amax(-1) / plain.abs().max()
    assert (apart < tolerance).float().mean() > 0.9


@pytest.mark.parametrize("kind", deepseek.KINDS)
def test_greedy_tokens_equal_transformers(kind: str, made: Callable[[str], Made]) -> None:
    """Prompts in chunks, then decodes side by side; one is taken out and starts again."""
    model, checkpoint = made(kind)
    wanted = [_generated(model, prompt, 12) for prompt in prompts()]
    driver = driver_of(checkpoint, make_ops(checkpoint.config, torch.float32))
    for chunk in (7, 64, 100):
        assert driver.greedy(prompts(), 12, chunk=chunk) == wanted
    cut = [prompt + answer[:5] for prompt, answer in zip(prompts(), wanted, strict=True)]
    assert driver.greedy(cut, 7, chunk=33) == [answer[5:] for answer in wanted]


def _generated(model: transformers.PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", deepseek.KINDS)
def test_every_tensor_of_a_checkpoint_has_its_shape(kind: str, made: Callable[[str], Made]) -> None:
    """And dummy weights have the same tensors, of the same shapes."""
    _, checkpoint = made(kind)
    weights = open_weights(checkpoint, torch.float32)
    dummy = DummyWeights(checkpoint.config, torch.float32)
    for name in _names(checkpoint.path):
        assert tuple(weights(name).shape) == families.shape_of(checkpoint.config, name)
        assert dummy(name).shape == weights(name).shape
    assert families.shape_of(checkpoint.config, "model.layers.0.self_attn.k_proj.weight") is None
    assert families.shape_of(checkpoint.config, "model.layers.3.mlp.up_proj.weight") is None


def _names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return list(file.keys())


def test_a_page_holds_one_latent_a_token(made: Callable[[str], Made]) -> None:
    config = made("v3")[1].config
    layout = kv.layout_of(config, 16, torch.bfloat16)
    assert layout.block_bytes == 3 * 16 * (64 + 16) * 2
    assert config.kv_bytes_per_token(2) * 16 == layout.block_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_have_the_same_bits_alone_batched_chunked_and_threaded(
    dtype: torch.dtype, made: Callable[[str], Made]
) -> None:
    """Native threads, that is: torch has one, as in a worker."""
    _, checkpoint = made("v3")
    config = replace(checkpoint.config, max_position=300)
    whole: Steps = [{p: (0, n) for p, n in enumerate(PROMPT_LENS)}]
    alone: Steps = [{p: (0, n)} for p, n in enumerate(PROMPT_LENS)]
    token_by_token: Steps = [
        {p: (at, at + 1) for p, n in enumerate(PROMPT_LENS) if at < n} for at in range(130)
    ]
    cut: Steps = [{0: (0, 33), 2: (0, 1)}, {2: (1, 100)}, {1: (0, 7), 0: (33, 61), 2: (100, 130)}]
    results = []
    for num_threads in (1, 2):
        ops = CpuOps(config, dtype, num_threads)
        model = families.build(config, open_weights(checkpoint, dtype), ops)
        for steps in (whole, alone, token_by_token, cut):
            results.append(torch.cat(in_steps(config, ops, model, steps)))
    assert all(torch.equal(result, results[0]) for result in results)
