"""Any other decoder: what pages and limits must know of it, by the names that most files use.

transformers' own code computes such a model. `nodeserve.model.foreign` holds the numbers read here
to what it is really given.
"""

from pathlib import Path

from nodeserve.config import ForeignConfig, ModelConfig
from nodeserve.config_readers.parts import (
    MAX_LAYERS,
    checked,
    end_tokens,
    refuse_quantised,
    rope_kind,
    stated_rope,
    token_id,
)
from nodeserve.errors import ModelError
from nodeserve.model_files import MAX_POSITION, Fields

MAX_EXPERTS = 4096
_LAYER_KINDS = ("full_attention", "sliding_attention")
_LONG_ROPES = ("longrope", "su")  # the second is its first name
_BEFORE = "original_max_position_embeddings"
_CLASSES = ("ForCausalLM", "LMHeadModel")


def is_decoder(fields: Fields) -> bool:
    """Whether the file is of a model that goes on with a text."""
    names = fields.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    decodes = isinstance(first, str) and first.endswith(_CLASSES)
    return decodes and not fields.get("is_encoder_decoder")


def read(fields: Fields, folder: Path) -> ModelConfig:
    """ModelError names what is missing, and refuses layers that keep no keys and values."""
    refuse_quantised(fields)
    kinds = fields.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind not in _LAYER_KINDS for kind in kinds):
        raise ModelError(
            f"{fields.where}: some layers are no attention over all tokens or a window"
            " (layer_types); only models of such layers can run as transformers' code"
        )
    hidden_size = _size(fields, "hidden_size", "n_embd", "d_model")
    num_heads = _size(fields, "num_attention_heads", "n_head", "n_heads")
    inner = _size(fields, "moe_intermediate_size", "intermediate_size", default=4 * hidden_size)
    experts = _size(fields, "num_experts", "num_local_experts", "n_routed_experts", default=1)
    return checked(
        fields.where,
        ModelConfig(
            architecture=FOREIGN,
            vocab_size=fields.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=inner * min(experts, MAX_EXPERTS),
            num_layers=_size(fields, "num_hidden_layers", "n_layer", "n_layers", most=MAX_LAYERS),
            num_heads=num_heads,
            num_kv_heads=_size(fields, "num_key_value_heads", "num_kv_heads", default=num_heads),
            head_dim=fields.size("head_dim", hidden_size // num_heads),
            max_position=_max_position(fields),
            norm_eps=1e-5,  # what follows is the other code's own business
            rope_theta=1.0,
            tie_embeddings=fields.get("tie_word_embeddings") is not False,
            eos_token_ids=end_tokens(folder, fields),
            bos_token_id=token_id(fields, "bos_token_id"),
            foreign=ForeignConfig(str(folder), str(fields.get("model_type"))),
        ),
    )


FOREIGN = "transformers"


def _max_position(fields: Fields) -> int:
    """Of LongRoPE those before it lengthens its waves: it does so for a whole pass, where one
    sequence is longer, so from there on a request's tokens would depend on the others'."""
    stated = _size(
        fields, "max_position_embeddings", "n_positions", "max_seq_len", most=MAX_POSITION
    )
    return min([stated, *(_size(one, _BEFORE) for one in _long_ropes(fields))])


def _long_ropes(fields: Fields) -> list[Fields]:
    """One for all layers, or one for each kind of them; some say how long only beside it."""
    stated = stated_rope(fields)
    values = [stated.values, *(one for one in stated.values.values() if isinstance(one, dict))]
    ropes = [Fields({_BEFORE: fields.get(_BEFORE), **one}, stated.where) for one in values]
    return [rope for rope in ropes if rope_kind(rope) in _LONG_ROPES]


def _size(fields: Fields, *names: str, default: int | None = None, most: int = 1 << 24) -> int:
    """The first of these that the file has."""
    found = next((name for name in names if fields.get(name) is not None), names[0])
    return fields.size(found, default, most=most)
