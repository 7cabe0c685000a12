"""How much memory KV takes: the same for every backend, whatever order it keeps inside a block."""

from dataclasses import dataclass

import torch

from nodeserve.config import ModelConfig
from nodeserve.errors import ConfigError
from nodeserve.shards import Shard

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def dtype_named(name: str) -> torch.dtype:
    """The type of weights and pages that a setting names; ConfigError for another word."""
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r}: use {', '.join(DTYPES)}")
    return DTYPES[name]


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The shape of one block: K and V of `block_size` tokens in all layers, one contiguous run.

    All layers and heads that a worker has, that is: see `nodeserve.shards`.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens
    dtype: torch.dtype
    first_layer: int = 0  # where ours begin in the whole model
    first_kv_head: int = 0

    @property
    def block_bytes(self) -> int:
        num_values = self.num_layers * 2 * self.num_kv_heads * self.block_size * self.head_dim
        return num_values * self.dtype.itemsize


def layout_of(
    config: ModelConfig, block_size: int, dtype: torch.dtype, shard: Shard | None = None
) -> KvLayout:
    """Of the whole model, or of one worker's part of it."""
    mine = shard or Shard(config)
    layers, heads = mine.layers, mine.kv_heads
    return KvLayout(
        len(layers),
        len(heads),
        config.head_dim,
        block_size,
        dtype,
        first_layer=layers.start,
        first_kv_head=heads.start,
    )


def pages_over(layout: KvLayout, pool: torch.Tensor) -> torch.Tensor:
    """The whole blocks of `pool` [num_bytes] uint8 as torch and GPUs keep them:
    [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]."""
    num_blocks = pool.numel() // layout.block_bytes
    pages = pool[: num_blocks * layout.block_bytes].view(layout.dtype)
    shape = (layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
    return pages.view(num_blocks, *shape)


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block of the pool."""
    return layout_of(config, block_size, dtype).block_bytes
