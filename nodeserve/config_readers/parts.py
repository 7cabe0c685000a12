"""What the readers of all families share: rotation, end tokens, and checks that always hold."""

from pathlib import Path

from nodeserve.config import ModelConfig, RopeScaling
from nodeserve.errors import ModelError
from nodeserve.model_files import MAX_POSITION, Fields, read_json
from nodeserve.types import shown

MAX_LAYERS = 4096


def checked(where: str, config: ModelConfig) -> ModelConfig:
    """The same; ModelError for numbers that no model of any family can have."""
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"{where}: {config.num_heads} heads cannot share {config.num_kv_heads} KV heads"
        )
    if config.head_dim % 2:
        raise ModelError(f"{where}: head_dim is {config.head_dim}, must be even")
    factors = config.rope_scaling.frequency_factors if config.rope_scaling else ()
    if factors and len(factors) != config.head_dim // 2:
        raise ModelError(f"{where}: {len(factors)} frequency factors for {config.head_dim // 2}")
    return config


def refuse_quantised(fields: Fields) -> None:
    """Weights that were quantised by somebody's library."""
    if quantisation := fields.get("quantization_config"):
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        raise ModelError(f"{fields.where}: weights quantised by {shown(method)} are not supported")


def rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from the keys of transformers 4 (rope_scaling) or 5 (rope_parameters)."""
    raw = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(raw, dict):
        raise fields.wrong("rope_scaling", "an object", raw)
    stated = Fields(raw, f"{fields.where}: rope scaling")
    stated.require("partial_rotary_factor", stated.get("partial_rotary_factor") or 1.0, 1.0)
    theta = stated.number("rope_theta", fields.number("rope_theta", 10_000.0))
    return theta, _rope_scaling(stated)


def _rope_scaling(rope: Fields) -> RopeScaling | None:
    match rope.get("rope_type") or rope.get("type") or "default":
        case "default":
            return None
        case "linear":
            return RopeScaling("linear", rope.number("factor"))
        case "llama3":
            return RopeScaling(
                "llama3",
                rope.number("factor"),
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_max_position=rope.size(
                    "original_max_position_embeddings", most=MAX_POSITION
                ),
            )
        case kind:
            raise ModelError(f"{rope.where} {shown(kind)} is not supported, only linear and llama3")


def end_tokens(folder: Path, fields: Fields) -> tuple[int, ...]:
    """generation_config.json knows best: for instruction models it adds the end of a turn."""
    path = folder / "generation_config.json"
    generation = Fields(read_json(path), str(path)) if path.is_file() else fields
    if generation.get("eos_token_id") is None:
        generation = fields
    return tuple(dict.fromkeys(generation.token_ids("eos_token_id")))


def token_id(fields: Fields, name: str) -> int | None:
    return None if fields.get(name) is None else fields.integer(name)
