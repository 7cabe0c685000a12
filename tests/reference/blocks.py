"""Random matrices in the block types of GGUF files, with scales a quantiser might write."""

import torch

from nodeserve.gguf import TENSOR_TYPES
from nodeserve.model.quantised import Quantised

TYPES = {kind.name: kind for kind in TENSOR_TYPES.values()}
KINDS = ["Q4_0", "Q4_1", "Q4_K", "Q8_0"]
_NUM_HALVES = {"Q4_0": 1, "Q4_1": 2, "Q4_K": 2, "Q8_0": 1}  # scale, and what is like it, in front


def random_blocks(
    kind: str, rows: int, columns: int, dtype: torch.dtype, seed: int = 0
) -> Quantised:
    """Any integers; scales of both signs where the type has them, zeros, a tiny scale."""
    found = TYPES[kind]
    generator = torch.Generator().manual_seed(seed)
    shape = (rows * columns // found.block_size, found.block_bytes)
    blocks = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    scales = torch.randn(shape[0], _NUM_HALVES[kind], generator=generator) * 0.01
    if kind == "Q8_0":
        scales.abs_()
    scales[-1] = 2.0**-24
    blocks[:, : 2 * _NUM_HALVES[kind]] = scales.half().view(torch.uint8)
    blocks[shape[0] // 2] = 0
    return Quantised(blocks.view(rows, -1), found, dtype)
