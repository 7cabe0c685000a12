"""Every family through a real node: prefill here, decode there, the tokens of transformers."""

import asyncio
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from tests.e2e.conftest import served
from tests.fakes.raw_client import RawClient
from tests.reference import hub, test_foreign

pytestmark = pytest.mark.slow

NUM_TOKENS = 12
PROMPTS = [[(7 * i * i + 3 * seed) % 211 for i in range(5 + 23 * seed)] for seed in range(4)]


def write(family: str, folder: Path) -> transformers.PreTrainedModel:
    """A tiny model with a tokenizer of as many words."""
    known = family in hub.SETTINGS
    model = hub.write(family, folder) if known else test_foreign.write(family, folder)
    words = {f"w{i}": i for i in range(hub.SHAPE["vocab_size"])}
    level = tokenizers.models.WordLevel(words, unk_token="w0")
    tokenizers.Tokenizer(level).save(str(folder / "tokenizer.json"))
    return model


async def ask(socket: Path) -> list[list[int]]:
    client = await RawClient.connect(socket)
    for number, prompt in enumerate(PROMPTS):
        client.submit(number, prompt, max_tokens=NUM_TOKENS)
    await client.finish(*range(len(PROMPTS)))
    await client.close()
    return [client.tokens[number] for number in range(len(PROMPTS))]


FAMILIES = ["mixtral", "qwen2-moe", "qwen3-moe", "opt", "opt-post-norm"]
AS_TRANSFORMERS_HAS_IT = ["gemma2", "gpt2"]


@pytest.mark.parametrize("family", [*FAMILIES, *AS_TRANSFORMERS_HAS_IT])
def test_a_node_gives_the_tokens_of_transformers(family: str, tmp_path: Path) -> None:
    model = write(family, tmp_path / "model")
    settings = {
        "layout": "1p1d",
        "dtype": "float32",
        "max_num_batched_tokens": 48,
        "max_num_seqs": 16,
        "kv_memory": "16MiB",
    }
    with served(tmp_path, model=str(tmp_path / "model"), max_model_len=128, **settings) as socket:
        answers = asyncio.run(ask(socket))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer) == NUM_TOKENS
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        assert logits.argmax(dim=-1).tolist() == answer
