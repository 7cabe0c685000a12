"""KV shards with a known value at every place, for checks of what a handoff moved.

The value depends on the block, the layer, K or V, the head of the whole model, the slot, the
dimension and the generation of the pool, so a page that was swapped, shifted or left from before
shows. The judge never asks the copy plan: it slices the whole model's tensor.
"""

from dataclasses import dataclass

import torch

POISON = -21846  # 0xAAAA: what no pull may leave where it should have written, nor write elsewhere


@dataclass(frozen=True, slots=True)
class Whole:
    """The KV of one block over all ranks, in 16-bit values."""

    num_layers: int
    num_heads: int
    block_size: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Rank:
    """The K/V heads that one rank of a tensor-parallel instance holds."""

    first_head: int
    num_heads: int

    def block_bytes(self, whole: Whole) -> int:
        return 2 * self.num_heads * whole.num_layers * 2 * whole.block_size * whole.head_dim


def ranks_of(whole: Whole, degree: int) -> list[Rank]:
    """Heads split evenly; with more ranks than heads each head is held by several."""
    if degree <= whole.num_heads:
        if whole.num_heads % degree:
            raise ValueError(f"{whole.num_heads} heads over {degree} ranks")
        count = whole.num_heads // degree
        return [Rank(rank * count, count) for rank in range(degree)]
    return [Rank(rank * whole.num_heads // degree, 1) for rank in range(degree)]


def values(
    whole: Whole, rank: Rank, blocks: torch.Tensor, generation: int, device: torch.device
) -> torch.Tensor:
    """[num_blocks, num_layers, 2, num_heads, block_size, head_dim] int16 of these block numbers."""
    shape = (whole.num_layers, 2, whole.num_heads, whole.block_size, whole.head_dim)
    places = torch.arange(torch.Size(shape).numel(), dtype=torch.int64, device=device).view(shape)
    places = places[:, :, rank.first_head : rank.first_head + rank.num_heads]
    numbers = (blocks.to(device).view(-1, 1, 1, 1, 1, 1).long() << 32) + places[None]
    return _mixed(numbers + (generation << 24) * 1_000_003)


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """16 bits of a hash of each int64; products wrap around, the same on every device."""
    numbers = (numbers ^ (numbers >> 29)) * 0x1F35_7AEA_2E62_A9C5
    numbers = (numbers ^ (numbers >> 32)) * 0x2545_F491_4F6C_DD1D
    return (numbers >> 40).to(torch.int16)
