"""What the readers of all families share: rotation, end tokens, and checks that always hold."""

import math
from pathlib import Path

from nodeserve.config import ModelConfig, RopeScaling
from nodeserve.errors import ModelError
from nodeserve.model_files import MAX_POSITION, Fields, read_json
from nodeserve.types import shown

MAX_LAYERS = 4096
MAX_STRETCH = 1e6  # what YaRN multiplies or divides by: no model's is near, and no float overflows


def checked(where: str, config: ModelConfig) -> ModelConfig:
    """The same; ModelError for numbers that no model of any family can have."""
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"{where}: {config.num_heads} heads cannot share {config.num_kv_heads} KV heads"
        )
    if config.head_dim % 2:
        raise ModelError(f"{where}: head_dim is {config.head_dim}, must be even")
    factors = config.rope_scaling.frequency_factors if config.rope_scaling else ()
    if factors and len(factors) != config.rope_dim // 2:
        raise ModelError(f"{where}: {len(factors)} frequency factors for {config.rope_dim // 2}")
    return config


def refuse_quantised(fields: Fields) -> None:
    """Weights that were quantised by somebody's library."""
    if quantisation := fields.get("quantization_config"):
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        raise ModelError(f"{fields.where}: weights quantised by {shown(method)} are not supported")


def fp8_block(fields: Fields) -> tuple[int, int] | None:
    """Rows and columns that share a scale in a file of FP8 matrices; None: it has none.

    ModelError for every other way to quantise.
    """
    if not (stated := fields.get("quantization_config")):
        return None
    if not isinstance(stated, dict) or stated.get("quant_method") != "fp8":
        refuse_quantised(fields)
    stored = Fields(stated, f"{fields.where}: quantization_config")
    stored.require("fmt", stored.get("fmt") or "e4m3", "e4m3")
    block = stored.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2:
        raise stored.wrong("weight_block_size", "two numbers", block)
    sizes = Fields(dict(zip(("rows", "columns"), block, strict=True)), f"{stored.where}: block")
    return sizes.size("rows"), sizes.size("columns")


def rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from the keys of transformers 4 (rope_scaling) or 5 (rope_parameters)."""
    stated = stated_rope(fields)
    stated.require("partial_rotary_factor", stated.get("partial_rotary_factor") or 1.0, 1.0)
    theta = stated.number("rope_theta", fields.number("rope_theta", 10_000.0))
    return theta, _rope_scaling(fields, stated, theta)


def stated_rope(fields: Fields) -> Fields:
    """What the file says of its rotation, nothing in it if that is nothing."""
    raw = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(raw, dict):
        raise fields.wrong("rope_scaling", "an object", raw)
    return Fields(raw, f"{fields.where}: rope scaling")


def rope_kind(rope: Fields) -> object:
    """Its name for how angles are scaled."""
    return rope.get("rope_type") or rope.get("type") or "default"


def _rope_scaling(fields: Fields, rope: Fields, theta: float) -> RopeScaling | None:
    match rope_kind(rope):
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
        case "yarn":
            return _yarn(fields, rope, theta)
        case kind:
            raise ModelError(
                f"{rope.where} {shown(kind)} is not supported, only linear, llama3 and yarn"
            )


def _yarn(fields: Fields, rope: Fields, theta: float) -> RopeScaling:
    if theta <= 1.0:
        raise rope.wrong("rope_theta", "above 1 for yarn", theta)
    longest = fields.size("max_position_embeddings", most=MAX_POSITION)
    factor = _stretch(rope, "factor")
    size = _mscale(factor, 1.0)
    if (turned := _weight(rope, "mscale")) and (every := _weight(rope, "mscale_all_dim")):
        size = _mscale(factor, turned) / _mscale(factor, every)
    return RopeScaling(
        "yarn",
        factor,
        original_max_position=rope.size(
            "original_max_position_embeddings", longest, most=MAX_POSITION
        ),
        beta_fast=_stretch(rope, "beta_fast", 32.0),
        beta_slow=_stretch(rope, "beta_slow", 1.0),
        truncate=rope.get("truncate") is not False,
        attention_factor=_stretch(rope, "attention_factor", size),
    )


def _stretch(rope: Fields, name: str, default: float | None = None) -> float:
    """A number that may be squared, and divided by, without leaving what a float holds."""
    number = rope.number(name, default)
    if not 1 / MAX_STRETCH <= number <= MAX_STRETCH:
        raise rope.wrong(name, f"{1 / MAX_STRETCH:g} to {MAX_STRETCH:g}", number)
    return number


def _weight(rope: Fields, name: str) -> float:
    """A number that may be 0, which says the same as none."""
    return _stretch(rope, name) if rope.get(name) else 0.0


def _mscale(factor: float, weight: float) -> float:
    """What YaRN multiplies by for a context that is `factor` times as long."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def yarn_mscale(fields: Fields) -> float:
    """The share of YaRN's factor that queries and keys get in all their numbers."""
    rope = stated_rope(fields)
    weight = _weight(rope, "mscale_all_dim") if rope_kind(rope) == "yarn" else 0.0
    return _mscale(_stretch(rope, "factor"), weight) if weight else 1.0


def end_tokens(folder: Path, fields: Fields) -> tuple[int, ...]:
    """generation_config.json knows best: for instruction models it adds the end of a turn."""
    path = folder / "generation_config.json"
    generation = Fields(read_json(path), str(path)) if path.is_file() else fields
    if generation.get("eos_token_id") is None:
        generation = fields
    return tuple(dict.fromkeys(generation.token_ids("eos_token_id")))


def token_id(fields: Fields, name: str) -> int | None:
    return None if fields.get(name) is None else fields.integer(name)
