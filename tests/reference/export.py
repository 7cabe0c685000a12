"""Writes any checkpoint as a folder of the hub, readable by us and by transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nodeserve.checkpoint import Checkpoint
from nodeserve.config import ModelConfig
from nodeserve.model.loader import open_weights
from nodeserve.text import gguf_vocabulary
from nodeserve.text.vocabulary import Vocabulary

_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
_LINEARS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
_NORMS = ["input_layernorm", "post_attention_layernorm"]


def tensor_names(config: ModelConfig) -> list[str]:
    """The hub names of all tensors that a model of this shape has."""
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    names += [] if config.tie_embeddings else ["lm_head.weight"]
    biased = _LINEARS[:3] if config.attention_bias else []
    norms = _NORMS + (["self_attn.q_norm", "self_attn.k_norm"] if config.qk_norm else [])
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        names += [f"{prefix}{part}.weight" for part in _LINEARS + norms]
        names += [f"{prefix}{part}.bias" for part in biased]
    return names


def export_folder(
    checkpoint: Checkpoint, folder: Path, dtype: torch.dtype = torch.float32, num_files: int = 1
) -> Path:
    """Weights of a GGUF checkpoint in `dtype`, its shape and its tokenizer; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(checkpoint, folder, dtype, num_files)
    _write_json(folder / "config.json", config_json(checkpoint.config))
    _write_json(
        folder / "generation_config.json", {"eos_token_id": list(checkpoint.config.eos_token_ids)}
    )
    export_tokenizer(gguf_vocabulary.read(checkpoint.path), folder)
    return folder


def export_tokenizer(vocabulary: Vocabulary, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(vocabulary.encoder.to_str(), encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "chat_template": vocabulary.chat_template,
            **vocabulary.template_tokens,
        },
    )


def config_json(config: ModelConfig) -> dict[str, Any]:
    assert config.rope_scaling is None, "config.json has no words for explicit factors"
    return {
        "architectures": [f"{_CLASSES[config.architecture]}ForCausalLM"],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }


def _write_weights(
    checkpoint: Checkpoint, folder: Path, dtype: torch.dtype, num_files: int
) -> None:
    weights = open_weights(checkpoint, dtype)
    names = tensor_names(checkpoint.config)
    if num_files == 1:
        save_file({name: weights(name) for name in names}, folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for i in range(num_files):
        file = f"model-{i + 1:05}-of-{num_files:05}.safetensors"
        places |= dict.fromkeys(names[i::num_files], file)
        save_file({name: weights(name) for name in names[i::num_files]}, folder / file)
    _write_json(folder / "model.safetensors.index.json", {"weight_map": places})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
