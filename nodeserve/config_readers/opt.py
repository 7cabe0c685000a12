"""OPT: learned positions, LayerNorm, biases everywhere; post-norm and projections in one size."""

from pathlib import Path

from nodeserve.config import ModelConfig, OptConfig
from nodeserve.config_readers.parts import (
    MAX_LAYERS,
    checked,
    end_tokens,
    refuse_quantised,
    token_id,
)
from nodeserve.errors import ModelError
from nodeserve.model_files import Fields

MAX_LEARNED_POSITION = 1 << 20  # a row of the table for each
NORM_EPS = 1e-5  # no file says it


def read(fields: Fields, folder: Path) -> ModelConfig:
    fields.require("activation_function", fields.get("activation_function") or "relu", "relu")
    affine = fields.get("layer_norm_elementwise_affine")
    fields.require("layer_norm_elementwise_affine", affine is None or bool(affine), True)
    refuse_quantised(fields)
    hidden_size, num_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if hidden_size % num_heads:
        raise ModelError(f"{fields.where}: {num_heads} heads cannot share {hidden_size} columns")
    norm_first = _flag(fields, "do_layer_norm_before")
    return checked(
        fields.where,
        ModelConfig(
            architecture="opt",
            vocab_size=fields.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.size("ffn_dim"),
            num_layers=fields.size("num_hidden_layers", most=MAX_LAYERS),
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=hidden_size // num_heads,
            max_position=fields.size("max_position_embeddings", most=MAX_LEARNED_POSITION),
            norm_eps=NORM_EPS,
            rope_theta=1.0,  # nothing is rotated
            tie_embeddings=_flag(fields, "tie_word_embeddings"),
            eos_token_ids=end_tokens(folder, fields),
            bos_token_id=token_id(fields, "bos_token_id"),
            opt=OptConfig(
                embedding_size=fields.size("word_embed_proj_dim", hidden_size),
                norm_first=norm_first,
                final_norm=norm_first and not fields.get("_remove_final_layer_norm"),
                biased=_flag(fields, "enable_bias"),
            ),
        ),
    )


def _flag(fields: Fields, name: str) -> bool:
    """True where nothing is said."""
    value = fields.get(name)
    return value is None or bool(value)
