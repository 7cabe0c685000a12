"""Tiny random models of each family, as transformers builds them."""

from dataclasses import replace
from math import log
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from nodeserve.checkpoint import Checkpoint
from nodeserve.config import ModelConfig, RopeScaling

SMALL = ModelConfig(
    architecture="llama",
    vocab_size=211,
    hidden_size=96,
    intermediate_size=200,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    max_position=1024,
    norm_eps=1e-5,
    rope_theta=10000.0,
)
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
YARN = RopeScaling("yarn", 4.0, original_max_position=64, attention_factor=0.1 * log(4.0) + 1.0)
FAMILIES = {
    "llama": SMALL,
    "llama-tied": replace(SMALL, tie_embeddings=True, num_kv_heads=6),
    "llama3-scaled": replace(SMALL, rope_scaling=LLAMA3),
    "llama-linear-scaled": replace(SMALL, rope_scaling=RopeScaling("linear", 4.0)),
    "llama-yarn": replace(SMALL, rope_scaling=YARN),
    "mistral": replace(SMALL, architecture="mistral", sliding_window=40, num_kv_heads=3),
    "qwen2": replace(SMALL, architecture="qwen2", attention_bias=True, num_kv_heads=1),
    "qwen3": replace(SMALL, architecture="qwen3", qk_norm=True, head_dim=80),
}
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


def _rope_parameters(config: ModelConfig) -> dict[str, float | str | int]:
    scaling, theta = config.rope_scaling, {"rope_theta": config.rope_theta}
    if scaling is None:
        return {"rope_type": "default", **theta}
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor, **theta}
    if scaling.kind == "yarn":
        start = scaling.original_max_position
        yarn = {"factor": scaling.factor, "original_max_position_embeddings": start}
        return {"rope_type": "yarn", **yarn, **theta}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
        **theta,
    }


def reference(config: ModelConfig) -> transformers.PreTrainedModel:
    config_class, model_class = CLASSES[config.architecture]
    settings = config_class(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position,
        rms_norm_eps=config.norm_eps,
        rope_parameters=_rope_parameters(config),
        tie_word_embeddings=config.tie_embeddings,
        sliding_window=config.sliding_window,
        attn_implementation="eager",
    )
    torch.manual_seed(7)
    model: transformers.PreTrainedModel = model_class(settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # zero biases would hide a missing one
            spread = 0.3 if name.endswith("bias") else 0.08
            parameter.copy_(torch.randn_like(parameter) * spread + ("norm" in name))
    return model


def written(model: transformers.PreTrainedModel, config: ModelConfig, folder: Path) -> Checkpoint:
    """A checkpoint with the model's weights in `folder`."""
    folder.mkdir()
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    state = {name: one for name, one in model.state_dict().items() if name not in tied}
    save_file(state, folder / "model.safetensors")
    return Checkpoint(folder, "safetensors", config, "tiny")
