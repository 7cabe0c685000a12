"""Pages of latents on real nodes: the same tokens whatever the layout, the batch and the road."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import served
from tests.e2e.test_same_tokens import Tokens, ask

pytestmark = pytest.mark.slow

# DeepSeek-V3's kind of model: two layers with experts behind one without.
CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 511,
}
BLOCK_BYTES = 3 * 16 * (64 + 16) * 2
ROADS: dict[str, dict[str, Any]] = {
    "1m chunked": {"layout": "1m", "max_num_batched_tokens": 48, "max_num_seqs": 32},
    "1m preempted": {"layout": "1m", "kv_memory": 40 * BLOCK_BYTES},
    "1p1d": {"layout": "1p1d"},
    "1p2d preempted": {"layout": "1p2d", "kv_memory": 17 * BLOCK_BYTES},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepseek")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


PROMPTS: Tokens = [[(7 * i * i + 31 * n) % 511 for i in range(3 + 9 * n)] for n in range(16)]


def run(
    folder: Path, model: Path, at_once: bool, short_of_memory: bool = False, **settings: Any
) -> tuple[Tokens, int]:
    common = {"model": str(model), "load_format": "dummy", "max_model_len": 256}
    common |= {"dtype": "bfloat16", "kv_memory": 2000 * BLOCK_BYTES}
    with served(folder, **{**common, **settings}) as socket:
        return asyncio.run(ask(socket, PROMPTS, at_once, short_of_memory))


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """One request at a time on one mixed worker."""
    tokens, _ = run(tmp_path_factory.mktemp("alone"), model, False, layout="1m")
    assert len({tuple(answer) for answer in tokens}) == len(PROMPTS)  # they do depend on prompts
    return tokens


@pytest.mark.parametrize("road", ROADS)
def test_tokens_do_not_depend_on_the_road(
    node_folder: Path, model: Path, alone: Tokens, road: str
) -> None:
    preempted = "preempted" in road
    tokens, preemptions = run(node_folder, model, True, preempted, **ROADS[road])
    assert tokens == alone
    assert (preemptions > 0) == preempted
