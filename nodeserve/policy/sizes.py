"""What one worker of an instance keeps of a model: weights and keys and values, by arithmetic.

Ranks of an expert-parallel instance have everything but the experts each for themselves. What
tensor parallelism copies instead of cutting (norms, latents' matrices) does not count beside the
rest; keys and values that it copies do.
"""

from nodeserve.config import ModelConfig
from nodeserve.layout import Shape


def rank_weights(config: ModelConfig, shape: Shape) -> int:
    """Numbers in the matrices of the worker that has most of them."""
    routed = config.num_routed_weights
    return -(-(config.num_weights - routed + -(-routed // shape.ep)) // (shape.tp * shape.pp))


def rank_kv_bytes_per_token(config: ModelConfig, shape: Shape, dtype_bytes: int) -> int:
    """Bytes that a token takes in the pages of one worker. Latents, and K/V heads that are fewer
    than the workers, are the same on several of them."""
    layers = -(-config.num_layers // shape.pp)
    whole = config.kv_bytes_per_token(dtype_bytes) // config.num_layers
    if config.mla is not None:
        return layers * whole
    heads = -(-config.num_kv_heads // shape.tp)
    return layers * (whole // config.num_kv_heads) * heads
