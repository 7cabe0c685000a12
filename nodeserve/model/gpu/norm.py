"""RMS norm of the residual stream, alone or with the addition that comes before it."""

import torch
import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    delta: tl.tensor,  # [rows, WIDTH] act
    hidden: tl.tensor,  # [rows, WIDTH] float32
    weight: tl.tensor,  # [WIDTH] float32
    normed: tl.tensor,  # [rows, WIDTH] act, written
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,  # hidden += delta first
) -> None:
    """One program a row, which fits into its registers."""
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + column
    x = tl.load(hidden + at, mask=inside, other=0.0)
    if ADD:
        x += tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(hidden + at, x, mask=inside)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    y = x * scale * tl.load(weight + column, mask=inside, other=0.0)
    tl.store(normed + at, y.to(normed.dtype.element_ty), mask=inside)


def _launch(
    delta: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    normed: torch.Tensor,
    eps: float,
    add: bool,
) -> None:
    rows, width = hidden.shape
    block = triton.next_power_of_2(width)
    rms_norm_kernel[(rows,)](
        delta,
        hidden,
        weight,
        normed,
        eps,
        WIDTH=width,
        BLOCK=block,
        ADD=add,
        num_warps=min(max(block // 256, 1), 16),
    )


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, normed: torch.Tensor, eps: float) -> None:
    """hidden [rows, width] float32, weight [width] float32 -> normed [rows, width] act"""
    _launch(hidden, hidden, weight, normed, eps, add=False)


def add_rms_norm(
    delta: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    normed: torch.Tensor,
    eps: float,
) -> None:
    """The same after hidden += delta; delta [rows, width] act."""
    _launch(delta, hidden, weight, normed, eps, add=True)
