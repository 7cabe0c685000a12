"""One definition of right: the same tokens whatever the layout, the batch and the road.

The reference is transformers on the same dequantised weights, greedy, in fp32: all 32 prompts, all
64 tokens. One forward pass over a prompt and the node's answer tells: if each token is the most
likely one after those before it, greedy generation gives just these, by induction. In bf16 the node
is its own reference, one request at a time on one mixed worker. Every road is gone in bf16; in fp32
the one that chunks, hands over and preempts (tests/reference/test_worker_model.py compares the
logits of each, to the bit, in both).
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from nodeserve.checkpoint import resolve
from nodeserve.text import Tokenizer
from tests.e2e.conftest import served
from tests.fakes.raw_client import RawClient
from tests.reference.embedded import needs_embedded_model
from tests.reference.export import export_folder

pytestmark = needs_embedded_model

NUM_PROMPTS, NUM_TOKENS = 32, 64
NUM_SHORT = 24  # enough for what they teach to outweigh what a node assumes before
Tokens = list[list[int]]

# Pages for about a third of the 32 requests at their longest: the rest is preempted and recomputed.
# A decode worker gets them one after the other from prefill, so there it takes fewer. Ample pages
# hold all at once: a worker that is not told reserves gigabytes at its start.
KV_MEMORY = {
    "ample": {"bfloat16": 150_000_000, "float32": 300_000_000},
    "small": {"bfloat16": 30_000_000, "float32": 60_000_000},
    "tiny": {"bfloat16": 12_000_000, "float32": 24_000_000},
}
ROADS: dict[str, dict[str, Any]] = {
    "1m whole": {"layout": "1m", "max_num_batched_tokens": 2048},
    "1m chunked": {"layout": "1m", "max_num_batched_tokens": 48, "max_num_seqs": 32},
    "1m preempted": {"layout": "1m", "kv_memory": "small"},
    "1p1d": {"layout": "1p1d"},
    "2p1d chunked, preempted": {
        "layout": "2p1d",
        "max_num_batched_tokens": 64,
        "kv_memory": "tiny",
    },
    "1p2d": {"layout": "1p2d"},
}


@pytest.fixture(scope="module")
def prompts() -> Tokens:
    """Slices of this repository's prose and code, 3 to 158 tokens."""
    root = Path(__file__).parents[2]
    text = (root / "README.md").read_text() + (root / "setup.py").read_text()
    ids = Tokenizer.load(str(resolve().path)).encode(text)
    return [ids[29 * i : 29 * i + 3 + 5 * i] for i in range(NUM_PROMPTS)]


async def ask(
    socket: Path, prompts: Tokens, at_once: bool, short_of_memory: bool = False
) -> tuple[Tokens, int]:
    """The tokens of each prompt, and how often any was preempted."""
    client = await RawClient.connect(socket)
    if short_of_memory:
        await seem_short(client, prompts)
    for i, prompt in enumerate(prompts):
        client.submit(i, prompt, max_tokens=NUM_TOKENS)
        if not at_once:
            await client.finish(i)
    await client.finish(*range(len(prompts)))
    await client.close()
    preemptions = sum(client.ends[i][0].timings["num_preemptions"] for i in range(len(prompts)))
    return [client.tokens[i] for i in range(len(prompts))], preemptions


async def seem_short(client: RawClient, prompts: Tokens) -> None:
    """Requests that may become long and stop at once: the node learns to keep next to no room for
    growth, so that what follows does not fit if it was given little memory."""
    names = range(1000, 1000 + NUM_SHORT)
    for name in names:
        client.submit(name, prompts[name % 8], max_tokens=3)
    await client.finish(*names)
    for name in names:
        first, *later = client.tokens[name]
        stops = [token for token in later if token != first]
        client.submit(name + NUM_SHORT, prompts[name % 8], max_tokens=180, stop_token_ids=stops)
    await client.finish(*(name + NUM_SHORT for name in names))


def settings_of(road: str, dtype: str) -> dict[str, Any]:
    settings = {"max_model_len": 256, "dtype": dtype, "kv_memory": "ample", **ROADS[road]}
    return settings | {"kv_memory": KV_MEMORY[settings["kv_memory"]][dtype]}


def at_once(socket: Path, road: str, prompts: Tokens) -> Tokens:
    """The tokens of all prompts together, some preempted where the road says so."""
    preempted = "preempted" in road
    tokens, preemptions = asyncio.run(ask(socket, prompts, True, preempted))
    assert (preemptions > 0) == preempted
    return tokens


def one_by_one(socket: Path, prompts: Tokens) -> Tokens:
    return asyncio.run(ask(socket, prompts, at_once=False))[0]


@pytest.fixture(scope="module")
def fp32(prompts: Tokens, tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """fp32, all at once on one mixed worker."""
    folder = tmp_path_factory.mktemp("fp32")
    with served(folder, **settings_of("1m whole", "float32")) as socket:
        return at_once(socket, "1m whole", prompts)


def test_fp32_tokens_are_those_of_transformers(
    prompts: Tokens, fp32: Tokens, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "SmolLM2"
    export_folder(resolve(), folder, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, answer in zip(prompts, fp32, strict=True):
        assert len(answer) == NUM_TOKENS
        with torch.inference_mode():
            found = model(torch.tensor([prompt + answer[:-1]]), logits_to_keep=NUM_TOKENS)
        assert found.logits[0].argmax(dim=-1).tolist() == answer


def test_fp32_tokens_do_not_depend_on_the_road(
    node_folder: Path, prompts: Tokens, fp32: Tokens
) -> None:
    road = "2p1d chunked, preempted"
    with served(node_folder, **settings_of(road, "float32")) as socket:
        assert at_once(socket, road, prompts) == fp32


@pytest.fixture(scope="module")
def mixed(prompts: Tokens, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokens, Tokens]:
    """bf16 on one mixed worker: one request at a time, then all at once."""
    folder = tmp_path_factory.mktemp("mixed")
    with served(folder, **settings_of("1m whole", "bfloat16")) as socket:
        return one_by_one(socket, prompts), at_once(socket, "1m whole", prompts)


def test_bf16_tokens_do_not_depend_on_company(mixed: tuple[Tokens, Tokens]) -> None:
    alone, together = mixed
    assert together == alone


@pytest.mark.parametrize("road", [road for road in ROADS if road != "1m whole"])
def test_bf16_tokens_do_not_depend_on_the_road(
    node_folder: Path, prompts: Tokens, mixed: tuple[Tokens, Tokens], road: str
) -> None:
    alone, _ = mixed
    with served(node_folder, **settings_of(road, "bfloat16")) as socket:
        assert at_once(socket, road, prompts) == alone
        if road == "1p1d":
            assert one_by_one(socket, prompts[::4]) == alone[::4]
