"""The real model's logits: near transformers' in fp32, no further off in bf16 than its own bf16 is.

Printed (pytest -s): max and mean difference to transformers' fp32 logits, and the mean
Kullback-Leibler divergence of the next-token distributions, over all positions of one prompt.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from nodeserve.checkpoint import Checkpoint, resolve
from nodeserve.model import backend, families, kv
from nodeserve.model.inputs import StepInputs
from nodeserve.model.loader import open_weights
from nodeserve.text import Tokenizer
from tests.reference.embedded import needs_embedded_model
from tests.reference.export import export_folder

pytestmark = needs_embedded_model

NUM_TOKENS = 256
BLOCK_SIZE = 16
Logits = Callable[[torch.dtype], torch.Tensor]


class Distance(NamedTuple):
    """Of logits to the fp32 reference, over all positions."""

    largest: float
    mean: float
    divergence: float
    same_choice: float

    @classmethod
    def between(cls, logits: torch.Tensor, reference: torch.Tensor) -> "Distance":
        gap = (logits - reference).abs()
        ours, theirs = logits.log_softmax(-1), reference.log_softmax(-1)
        divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean()
        same = (logits.argmax(-1) == reference.argmax(-1)).float().mean()
        return cls(float(gap.max()), float(gap.mean()), float(divergence), float(same))


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    return Tokenizer.load(str(resolve().path)).encode(text)[:NUM_TOKENS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_folder(resolve(), tmp_path_factory.mktemp("logits") / "SmolLM2")


@pytest.fixture(scope="module")
def theirs(prompt: list[int], folder: Path) -> Logits:
    from transformers import AutoModelForCausalLM

    def logits(dtype: torch.dtype) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        with torch.inference_mode():
            found: torch.Tensor = model(torch.tensor([prompt])).logits[0].float()
        return found

    return logits


def ours(checkpoint: Checkpoint, prompt: list[int], dtype: torch.dtype) -> torch.Tensor:
    """[len(prompt), vocab_size]: the whole prompt in one step."""
    config, count = checkpoint.config, len(prompt)
    ops = backend.make_ops(config, dtype, block_size=BLOCK_SIZE)
    layout = kv.layout_of(config, BLOCK_SIZE, dtype)
    num_blocks = -(-count // BLOCK_SIZE)
    cache = ops.cache(layout, torch.zeros(num_blocks * layout.block_bytes, dtype=torch.uint8))
    model = families.build(config, open_weights(checkpoint, dtype), ops)
    row = torch.arange(count, dtype=torch.int32)
    inputs = StepInputs(
        token_ids=torch.tensor(prompt, dtype=torch.int32),
        positions=row,
        query_starts=torch.tensor([0, count], dtype=torch.int32),
        context_lens=torch.tensor([count], dtype=torch.int32),
        block_table=torch.arange(num_blocks, dtype=torch.int32)[None],
        logit_rows=row,
        num_decodes=0,
        max_query_len=count,
        max_context_len=count,
    )
    return model.forward(inputs, cache).clone()


@pytest.fixture(scope="module")
def embedded(prompt: list[int]) -> Logits:
    """Ours, computed once in each type."""
    return functools.cache(lambda dtype: ours(resolve(), prompt, dtype))


@pytest.fixture(scope="module")
def reference(theirs: Logits) -> torch.Tensor:
    return theirs(torch.float32)


def test_fp32_logits_equal_transformers(embedded: Logits, reference: torch.Tensor) -> None:
    found = Distance.between(embedded(torch.float32), reference)
    print(f"fp32: {found}")
    assert found.largest < 2e-3 and found.same_choice == 1.0


def test_bf16_is_as_near_to_fp32_as_transformers_own(
    embedded: Logits, theirs: Logits, reference: torch.Tensor
) -> None:
    mine = Distance.between(embedded(torch.bfloat16), reference)
    its = Distance.between(theirs(torch.bfloat16), reference)
    print(f"\nbf16 ours:         {mine}\nbf16 transformers: {its}")
    assert mine.mean <= its.mean and mine.divergence <= its.divergence
    assert mine.largest <= 1.25 * its.largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors_and_gguf_give_the_same_logits(
    embedded: Logits, prompt: list[int], folder: Path, dtype: torch.dtype
) -> None:
    assert torch.equal(ours(resolve(str(folder)), prompt, dtype), embedded(dtype))
