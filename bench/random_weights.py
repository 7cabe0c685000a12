"""Random weights of a model's shape by hub name: dense, or in the blocks of a GGUF file."""

from collections.abc import Sequence

import torch

from bench.floors import weight_bytes
from nodeserve.config import ModelConfig
from nodeserve.gguf import TENSOR_TYPES, TensorType
from nodeserve.model.quantised import Quantised, Weight

_TYPES = {kind.name: kind for kind in TENSOR_TYPES.values()}
_LAYER, _HEAD = _TYPES["Q4_1"], _TYPES["Q8_0"]


def _shape(config: ModelConfig, name: str) -> tuple[int, ...]:
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "embed_tokens": (config.vocab_size, config.hidden_size),
        "q_proj": (heads, config.hidden_size),
        "k_proj": (kv_heads, config.hidden_size),
        "v_proj": (kv_heads, config.hidden_size),
        "o_proj": (config.hidden_size, heads),
        "gate_proj": (config.intermediate_size, config.hidden_size),
        "up_proj": (config.intermediate_size, config.hidden_size),
        "down_proj": (config.hidden_size, config.intermediate_size),
    }
    return shapes.get(name.rsplit(".", 2)[-2], (config.hidden_size,))


def dense_weights(config: ModelConfig, name: str) -> torch.Tensor:
    shape = _shape(config, name)
    return torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.03


def quantised_weights(config: ModelConfig, name: str, dtype: torch.dtype) -> Weight:
    """4 bits in the layers, 8 in the table that is also the head; norms stay as they are."""
    shape = _shape(config, name)
    if len(shape) == 1:
        return torch.ones(shape)
    if "embed_tokens" in name:
        return _blocks(_HEAD, shape, 1, dtype)
    return _blocks(_LAYER, shape, 2, dtype)


def quantised_bytes(config: ModelConfig) -> int:
    """Of all linears that `quantised_weights` gives."""
    layer, head = (kind.block_bytes / kind.block_size for kind in (_LAYER, _HEAD))
    return weight_bytes(config, layer, head)


def _blocks(
    kind: TensorType, shape: Sequence[int], num_scales: int, dtype: torch.dtype
) -> Quantised:
    """Any integers, and scales that make numbers of them like the dense ones."""
    rows, columns = shape
    count = rows * columns // kind.block_size
    blocks = torch.randint(256, (count, kind.block_bytes), dtype=torch.uint8)
    scale = torch.full((count, num_scales), 0.0005 if num_scales == 1 else 0.004)
    scale[:, 1:] = -0.03
    blocks[:, : 2 * num_scales] = scale.half().view(torch.uint8)
    return Quantised(blocks.view(rows, -1), kind, dtype)
