"""Row-wise operations of plain torch that no backend has a kernel of its own for.

Each row is computed alone: what shares its step does not change its bits.
"""

import torch
from torch.nn import functional

from nodeserve.model.ops import AddNorm, Op, Reduce


def layer_norm(scale: torch.Tensor, offset: torch.Tensor, eps: float) -> Op:
    """scale and offset [hidden] float32 on the device of what comes."""

    def op(x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(functional.layer_norm(x, scale.shape, scale, offset, eps))

    return op


def add_positions(table: torch.Tensor) -> Op:
    """table [positions, hidden] on the device of what comes."""

    def op(x: torch.Tensor, out: torch.Tensor) -> None:
        out.add_(functional.embedding(x, table))

    return op


def relu_of(linear: Op) -> Op:
    def op(x: torch.Tensor, out: torch.Tensor) -> None:
        linear(x, out)
        out.relu_()

    return op


def add_reduced(linear: Op, width: int, bias: torch.Tensor | None, reduce: Reduce | None) -> Op:
    """linear writes [rows, width] float32; bias [width] float32."""

    def op(x: torch.Tensor, out: torch.Tensor) -> None:
        product = x.new_empty(x.size(0), width, dtype=torch.float32)
        linear(x, product)
        if reduce is not None:
            reduce(product)
        out.add_(product if bias is None else product.add_(bias))

    return op


def add_norm(norm: Op, reduce: Reduce | None) -> AddNorm:
    def op(x: torch.Tensor, hidden: torch.Tensor, normed: torch.Tensor) -> None:
        if reduce is not None:
            reduce(x)
        hidden.add_(x)
        norm(hidden, normed)

    return op
