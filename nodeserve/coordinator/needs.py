"""What a worker of a shape needs at least: its part of the weights, and pages for one sequence."""

from typing import NamedTuple

from nodeserve.config import EngineConfig, ModelConfig
from nodeserve.coordinator.places import parts_of
from nodeserve.layout import Shape
from nodeserve.policy.blocks import blocks_for

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class Needs(NamedTuple):
    """Bytes of the workers that have most of either."""

    weight_bytes: int
    kv_bytes: int  # of one sequence of the full context


def dtype_of(config: EngineConfig) -> str:
    """What "auto" stands for."""
    return "bfloat16" if config.dtype == "auto" else config.dtype


def needs_of(config: EngineConfig, model: ModelConfig, shape: Shape, context: int) -> Needs:
    """Of a worker of such an instance, with a context of so many tokens."""
    parts = parts_of(model, shape, config.redundant_experts)
    value_bytes = DTYPE_BYTES[dtype_of(config)]
    token_bytes = max(part.kv_bytes_per_token(value_bytes) for part in parts)
    num_blocks = blocks_for(context, config.block_size) + 1
    weight_bytes = max(part.num_weights for part in parts) * value_bytes
    return Needs(weight_bytes, num_blocks * token_bytes * config.block_size)
