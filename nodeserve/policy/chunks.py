"""Chunks of prompts that take equally long, for batches that stages work on side by side.

Where a batch follows another through the stages, one that takes longer leaves all other stages
waiting. A token costs more the more context its attention looks at, so by tokens alone the last
chunk of a long prompt takes much longer than the first. Here a chunk of `n` tokens behind `context`
others costs as much as

    n + weight * n * (context + n / 2)

tokens without any attention; `weight` is what one pair of tokens in attention is worth.
"""

import math

from nodeserve.config import ModelConfig


def attention_weight(config: ModelConfig) -> float:
    """`weight` of a model: multiplications for a pair of tokens in attention, over those for a
    token anywhere else."""
    pair = 2 * config.num_layers * config.num_heads * config.head_dim
    return pair / config.num_active_weights


def chunk_cost(num_tokens: int, context: int, weight: float) -> float:
    """In tokens without attention."""
    return num_tokens * (1.0 + weight * (context + num_tokens / 2))


def longest_chunk(cost: float, context: int, weight: float) -> int:
    """The most tokens behind `context` that cost no more."""
    if weight <= 0.0:
        return int(cost)
    own = 1.0 + weight * context
    root = math.sqrt(own * own + 2.0 * weight * max(cost, 0.0))
    return int((root - own) / weight + 1e-9)
