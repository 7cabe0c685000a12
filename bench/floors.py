"""The least bytes and operations of a step: what the ceilings are divided by. No torch here."""

from nodeserve.config import ModelConfig


def linear_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(n, k) of one layer's linears."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return [
        (heads + 2 * kv_heads, config.hidden_size),
        (config.hidden_size, heads),
        (2 * config.intermediate_size, config.hidden_size),
        (config.hidden_size, config.intermediate_size),
    ]


def layer_weights(config: ModelConfig) -> int:
    """Values in the linears of all layers."""
    return config.num_layers * sum(n * k for n, k in linear_shapes(config))


def head_weights(config: ModelConfig) -> int:
    return config.vocab_size * config.hidden_size


def weight_bytes(config: ModelConfig, layer_bytes: float, head_bytes: float) -> int:
    """Of all linears, from the bytes that a value takes in the layers and in the head."""
    return int(layer_weights(config) * layer_bytes + head_weights(config) * head_bytes)


def step_bytes(
    config: ModelConfig, dtype_bytes: int, num_visible: int, weights: int | None = None
) -> int:
    """Weights (of the dtype unless given) and the KV of all visible tokens, each read once."""
    if weights is None:
        weights = weight_bytes(config, dtype_bytes, dtype_bytes)
    return weights + num_visible * config.kv_bytes_per_token(dtype_bytes)


def step_flops(config: ModelConfig, num_tokens: int, num_logits: int, num_pairs: int) -> int:
    """num_pairs: (query token, visible token) pairs over all sequences."""
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * num_pairs
    head = num_logits * head_weights(config)
    return 2 * (num_tokens * layer_weights(config) + head + attention)


def causal_pairs(num_new: int, context: int) -> int:
    """(query token, visible token) pairs of the last `num_new` tokens of `context`."""
    return num_new * (context - num_new) + num_new * (num_new + 1) // 2
