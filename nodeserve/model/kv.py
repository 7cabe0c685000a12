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
    """The shape of one block: what `block_size` tokens keep in all layers, one contiguous run.

    All layers and heads that a worker has, that is: see `nodeserve.shards`. A layer keeps K and V,
    two planes, or one plane of latents (MLA). Latents are like the K of a single head that all
    query heads share: every worker of a tensor-parallel instance keeps all of them.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens
    dtype: torch.dtype
    planes: int = 2  # K and V; 1: latents
    first_layer: int = 0  # where ours begin in the whole model
    first_kv_head: int = 0

    @property
    def block_bytes(self) -> int:
        num_values = self.num_layers * self.planes * self.num_kv_heads
        return num_values * self.block_size * self.head_dim * self.dtype.itemsize


def layout_of(
    config: ModelConfig, block_size: int, dtype: torch.dtype, shard: Shard | None = None
) -> KvLayout:
    """Of the whole model, or of one worker's part of it."""
    mine = shard or Shard(config)
    layers, heads = mine.layers, mine.kv_heads
    planes, head_dim = (2, config.head_dim) if config.mla is None else (1, config.mla.latent_dim)
    return KvLayout(
        len(layers),
        len(heads),
        head_dim,
        block_size,
        dtype,
        planes,
        first_layer=layers.start,
        first_kv_head=heads.start,
    )


def pages_over(layout: KvLayout, pool: torch.Tensor) -> torch.Tensor:
    """The whole blocks of `pool` [num_bytes] uint8 as torch and GPUs keep them:
    [num_blocks, num_layers, planes, num_kv_heads, block_size, head_dim]."""
    num_blocks = pool.numel() // layout.block_bytes
    pages = pool[: num_blocks * layout.block_bytes].view(layout.dtype)
    heads = (layout.planes, layout.num_kv_heads)
    return pages.view(num_blocks, layout.num_layers, *heads, layout.block_size, layout.head_dim)


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block of the pool."""
    return layout_of(config, block_size, dtype).block_bytes
