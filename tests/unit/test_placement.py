"""From settings to places: what is chosen, and the words of every refusal."""

from pathlib import Path

import pytest

from nodeserve.checkpoint import Checkpoint
from nodeserve.config import EngineConfig, ModelConfig
from nodeserve.coordinator.placement import choose_layout, resolve, share_cores
from nodeserve.errors import ConfigError
from nodeserve.types import Role

M, P, D = Role.MIXED, Role.PREFILL, Role.DECODE
MODEL = ModelConfig("llama", 100, 64, 128, 2, 4, 2, 16, 1024, 1e-5, 1e4)
CHECKPOINT = Checkpoint(Path("x"), "gguf", MODEL, "tiny")

REFUSED = {
    "block size": (EngineConfig(block_size=24), "--block-size must be a multiple of 16"),
    "no sequences": (EngineConfig(max_num_seqs=0), "--max-num-seqs must be at least 1"),
    "small budget": (EngineConfig(max_num_batched_tokens=8), "below --max-num-seqs"),
    "dtype": (EngineConfig(dtype="int8"), "--dtype int8: use auto, bfloat16"),
    "device": (EngineConfig(device="tpu"), "--device tpu"),
    "cuda": (EngineConfig(device="cuda"), "use --device cpu"),
    "gpus on cpu": (EngineConfig(device="cpu", gpus="0-1"), "contradict"),
    "gpus and layout": (EngineConfig(layout="1p1d", gpus="0-3"), "2 left over"),
    "shape": (EngineConfig(layout="1p:tp2,2d"), "for example 1p,2d"),
    "context": (EngineConfig(max_model_len=5000), "use 2 to 1024"),
    "pages too small": (EngineConfig(kv_memory=4096), "--kv-memory 4096 is below"),
    "pages too large": (EngineConfig(kv_memory=1 << 50), "--shm-size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_by_name(name: str) -> None:
    config, words = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        resolve(config, CHECKPOINT)
    assert words in str(caught.value)


def test_auto_is_resolved_to_numbers() -> None:
    plan = resolve(EngineConfig(layout="1p1d", max_model_len=512), CHECKPOINT)
    assert plan.config.dtype == "bfloat16" and plan.config.device == "cpu"
    assert plan.config.served_model_name == "tiny" and plan.config.layout == "1p1d"
    assert plan.max_model_len == 512 and plan.max_num_batched_tokens == 128
    assert plan.kv_memory >= MODEL.kv_bytes_per_token(2) * 512
    assert [place.role for place in plan.places] == [P, D]


def test_two_cores_get_a_prefill_and_a_decode_worker() -> None:
    assert str(choose_layout(None, 2)) == "1p1d"
    assert str(choose_layout(None, 1)) == "1m"


def test_cores_are_shared_out_without_overlap() -> None:
    places, notes = share_cores((P, D, D), (0, 1, 2, 3, 4, 5, 6))
    assert [place.cpus for place in places] == [(0, 1, 2), (3, 4), (5, 6)]
    assert [place.num_threads for place in places] == [3, 2, 2] and not notes


def test_more_workers_than_cores_take_turns_and_say_so() -> None:
    places, (note,) = share_cores((M, M, M), (4, 6))
    assert [place.cpus for place in places] == [(4,), (6,), (4,)]
    assert all(place.num_threads == 1 for place in places)
    assert "3 workers share 2 cores" in note
