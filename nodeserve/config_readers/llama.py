"""Llama, Mistral, Qwen2 and Qwen3; of Mixtral and Qwen's sparse models, all but the experts."""

from pathlib import Path

from nodeserve.config import ModelConfig
from nodeserve.config_readers.parts import (
    MAX_LAYERS,
    checked,
    end_tokens,
    refuse_quantised,
    rope,
    token_id,
)
from nodeserve.model_files import MAX_POSITION, Fields


def read(fields: Fields, folder: Path) -> ModelConfig:
    """Everything of one of these models; of a sparse one, everything but its experts."""
    architecture = str(fields.get("model_type"))
    _check_variants(fields)
    rope_theta, rope_scaling = rope(fields)
    num_layers = fields.size("num_hidden_layers", most=MAX_LAYERS)
    window, first_window_layer = _window(fields, architecture, num_layers)
    hidden_size, num_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    return checked(
        fields.where,
        ModelConfig(
            architecture=architecture,
            vocab_size=fields.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.size("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=fields.size("num_key_value_heads", num_heads),
            head_dim=fields.size("head_dim", hidden_size // num_heads),
            max_position=fields.size("max_position_embeddings", most=MAX_POSITION),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_embeddings=bool(fields.get("tie_word_embeddings")),
            attention_bias=_qkv_bias(fields, architecture),
            qk_norm=architecture in ("qwen3", "qwen3_moe"),
            sliding_window=window,
            first_window_layer=first_window_layer,
            eos_token_ids=end_tokens(folder, fields),
            bos_token_id=token_id(fields, "bos_token_id"),
        ),
    )


def _qkv_bias(fields: Fields, architecture: str) -> bool:
    if architecture == "qwen2_moe":
        return fields.get("qkv_bias") is not False
    return architecture == "qwen2"


def _check_variants(fields: Fields) -> None:
    """Refuse by name what the model code does not do."""
    fields.require("hidden_act", fields.get("hidden_act") or "silu", "silu")
    for name in ("attention_bias", "mlp_bias"):  # biases beyond q, k and v
        fields.require(name, bool(fields.get(name)), False)
    fields.require("partial_rotary_factor", fields.get("partial_rotary_factor") or 1.0, 1.0)
    refuse_quantised(fields)


def _window(fields: Fields, architecture: str, num_layers: int) -> tuple[int | None, int]:
    """The sliding window and the first layer that has it.

    Mistral and Mixtral slide in all layers where a window is given. Qwen has a switch, off by
    default, and then leaves the first `max_window_layers` layers whole. Llama has none.
    """
    window = fields.get("sliding_window")
    if architecture.startswith("qwen"):
        if not fields.get("use_sliding_window"):
            return None, 0
        first = fields.integer("max_window_layers", 28)
    elif architecture in ("mistral", "mixtral"):
        first = 0
    else:
        return None, 0
    if window is None or first >= num_layers:
        return None, 0
    return fields.size("sliding_window", most=MAX_POSITION), first
