"""Matrices that a checkpoint keeps in 8-bit floats, with a scale for each block of them.

They become numbers of the model's type when they are read: nothing computes in 8 bits here.
"""

from collections.abc import Sequence

import torch

CHUNK_ROWS = 1024  # restored at once: a whole matrix in float32 would be four times its bytes


def num_blocks(shape: Sequence[int], block: tuple[int, int]) -> tuple[int, int]:
    """The shape of a matrix's scales; blocks at the ends may be cut."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def from_fp8(
    weight: torch.Tensor,
    scales: torch.Tensor,
    block: tuple[int, int],
    dtype: torch.dtype,
    first_row: int = 0,
    first_column: int = 0,
) -> torch.Tensor:
    """weight [n, k] times its scales, each of which counts for `block` rows and columns.

    weight may be a part of a matrix, from `first_row` and `first_column` on; scales
    [blocks of rows, blocks of columns] float32 are always the whole matrix's.
    """
    n, k = weight.shape
    rows = torch.arange(first_row, first_row + n, device=weight.device) // block[0]
    columns = torch.arange(first_column, first_column + k, device=weight.device) // block[1]
    wide = scales.float()[:, columns]
    restored = torch.empty(n, k, dtype=dtype, device=weight.device)
    for first in range(0, n, CHUNK_ROWS):
        part = slice(first, first + CHUNK_ROWS)
        restored[part] = weight[part].float().mul_(wide[rows[part]])
    return restored
