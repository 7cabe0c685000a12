"""Experts on a GPU: the matrices of all of them in two tensors, one grouped product for each.

How many rows each expert has stays on the device, so a step with experts can be captured: the grid
is for the most tiles that so many rows can make, and programs beyond the true ones end at once.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from nodeserve.model.expert_parts import Mlp
from nodeserve.model.gpu import pointwise
from nodeserve.model.quantised import dense

MIN_TILE, MAX_TILE = 16, 128  # rows of a program; a matrix unit takes no fewer
COLUMNS = 128  # of a program


@triton.jit(do_not_specialize=["num_groups"])
def grouped_kernel(
    x: tl.tensor,  # [num_rows, DEPTH] act, sorted by group
    weight: tl.tensor,  # [num_groups, WIDTH, DEPTH] act
    counts: tl.tensor,  # [num_groups] int64, rows of each
    out: tl.tensor,  # [num_rows, WIDTH] act, written
    num_groups: tl.tensor,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUPS: tl.constexpr,  # num_groups to the next power of 2
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """A tile of rows of one group by a tile of columns."""
    tile = tl.program_id(0)
    number = tl.arange(0, GROUPS)
    sizes = tl.load(counts + number, mask=number < num_groups, other=0).to(tl.int32)
    tiles = (sizes + ROWS - 1) // ROWS
    ends = tl.cumsum(tiles, axis=0)
    group = tl.sum((ends <= tile).to(tl.int32), axis=0)
    if group >= num_groups:
        return
    before = number < group
    in_group = tile - tl.sum(tl.where(before, tiles, 0), axis=0)
    first = tl.sum(tl.where(before, sizes, 0), axis=0)
    size = tl.sum(tl.where(number == group, sizes, 0), axis=0)

    place = in_group * ROWS + tl.arange(0, ROWS)
    row = (first + place).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    matrix = weight + group.to(tl.int64) * WIDTH * DEPTH
    is_row, is_column = place < size, column < WIDTH
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, DEPTH, STEP):
        depth = start + tl.arange(0, STEP)
        inside = depth < DEPTH
        left = tl.load(
            x + row[:, None] * DEPTH + depth[None, :],
            mask=is_row[:, None] & inside[None, :],
            other=0.0,
        )
        right = tl.load(
            matrix + column[None, :] * DEPTH + depth[:, None],
            mask=is_column[None, :] & inside[:, None],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    tl.store(
        out + row[:, None] * WIDTH + column[None, :],
        total.to(out.dtype.element_ty),
        mask=is_row[:, None] & is_column[None, :],
    )


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, out: torch.Tensor
) -> None:
    """x [rows, k] act sorted by group, weight [groups, n, k], counts [groups] int64 that add up to
    the rows -> out [rows, n], each group's rows times its matrix^T"""
    num_rows, (num_groups, width, depth) = x.size(0), weight.shape
    if num_rows == 0:
        return
    rows = rows_of_a_tile(num_rows, num_groups)
    most_tiles = num_rows // rows + min(num_groups, num_rows)
    grouped_kernel[(most_tiles, triton.cdiv(width, COLUMNS))](
        x,
        weight,
        counts,
        out,
        num_groups,
        WIDTH=width,
        DEPTH=depth,
        GROUPS=triton.next_power_of_2(num_groups),
        ROWS=rows,
        COLUMNS=COLUMNS,
        STEP=128 // x.element_size(),
        PRECISION="ieee",
        num_warps=8 if rows > 64 else 4,
    )


def rows_of_a_tile(num_rows: int, num_groups: int) -> int:
    """About what a group has: few rows are the memory's, more than a tile's would be read twice."""
    each: int = triton.next_power_of_2(max(1, num_rows // num_groups))
    return min(max(each, MIN_TILE), MAX_TILE)


class GpuGrouped:
    """`Grouped`: gate above up in one matrix for each expert."""

    def __init__(
        self, num_mlps: int, mlp: Callable[[int], Mlp], dtype: torch.dtype, device: torch.device
    ) -> None:
        for place in range(num_mlps):
            gate, up, down = (dense(one) for one in mlp(place))
            if place == 0:
                inner, hidden = gate.shape
                shape = (num_mlps, 2 * inner, hidden)
                self._gate_up = torch.empty(shape, dtype=dtype, device=device)
                self._down = torch.empty(num_mlps, hidden, inner, dtype=dtype, device=device)
            self._gate_up[place, :inner].copy_(gate)
            self._gate_up[place, inner:].copy_(up)
            self._down[place].copy_(down)

    def __call__(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        num_rows, inner = x.size(0), self._down.size(2)
        gate_up = x.new_empty(num_rows, 2 * inner)
        grouped_linear(x, self._gate_up, counts, gate_up)
        middle = x.new_empty(num_rows, inner)
        if num_rows:
            pointwise.silu_mul(gate_up, middle)
        out = x.new_empty(num_rows, self._down.size(1))
        grouped_linear(middle, self._down, counts, out)
        return out
