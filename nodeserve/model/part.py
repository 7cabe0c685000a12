"""A part of a stored tensor: some of its rows, or some columns of every row."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from nodeserve.gguf import TensorInfo


@dataclass(frozen=True, slots=True)
class Part:
    """`span` says which of a dimension's indexes, given how many there are.

    A tensor without this dimension is its own part: the bias of a matrix that is cut by columns.
    """

    dim: int
    span: Callable[[int], range]

    def within(self, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """What to index a tensor of this shape with."""
        places = [slice(0, size) for size in shape]
        if self.dim < len(shape):
            span = self.span(shape[self.dim])
            places[self.dim] = slice(span.start, span.stop)
        return tuple(places)

    def shape_within(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(place.stop - place.start for place in self.within(shape))


def blocks_within(
    data: torch.Tensor, tensor: TensorInfo, part: Part
) -> tuple[torch.Tensor, TensorInfo] | None:
    """Of a tensor whose packed bytes are `data` [num_bytes] uint8: the part's bytes and shape.

    Rows are not copied, columns are; None where the part begins or ends inside a block.
    """
    if part.dim >= len(tensor.shape):
        return data, tensor
    block_size = tensor.type.block_size
    place = part.within(tensor.shape)[part.dim]
    *units, columns = tensor.shape
    if part.dim == len(units):
        if place.start % block_size or place.stop % block_size:
            return None
        place = slice(place.start // block_size, place.stop // block_size)
    blocks = data.view(*units, columns // block_size, tensor.type.block_bytes)
    mine = blocks.narrow(part.dim, place.start, place.stop - place.start).reshape(-1)
    return mine, replace(tensor, shape=part.shape_within(tensor.shape), num_bytes=mine.numel())
