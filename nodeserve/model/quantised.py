"""Matrices that stay as a GGUF file stores them: blocks of small integers with their scales.

A quantised matrix is a storage of the same numbers, not another model: what computes with it must
give the bits that `dense` would. Rows are runs of blocks, so whole rows can be moved and joined
without looking inside.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from nodeserve.gguf import TensorInfo, TensorType
from nodeserve.model.dequantise import dequantise, halves, six_bit_scales

GROUP = 32  # values along a row that share a scale


class Integers(NamedTuple):
    """A matrix [n, k] in parts: round(round((q - zero) * scale) + low) in fp32, then its dtype.

    The first of the two roundings changes nothing. All tensors are contiguous.
    """

    storage: str  # what the native kernels call it: "q4", "q4_f32" or "q8"
    zero: float
    q: torch.Tensor  # [n, k] uint8: 0 to 15, or the bytes of int8 for "q8"
    scale: torch.Tensor  # [n, k / 32] fp32; numbers of fp16 unless "q4_f32"
    low: torch.Tensor | None  # [n, k / 32] fp32 like scale; None for "q8"


# [num_blocks, block_bytes] uint8 to q, scale and low, a row per block
_Split = Callable[[torch.Tensor], Integers]


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Each row's low halves, then its high halves."""
    return torch.cat([packed & 15, packed >> 4], dim=1)


def _q8_0(blocks: torch.Tensor) -> Integers:
    return Integers("q8", 0.0, blocks[:, 2:], halves(blocks, 0, 2), None)


def _q4_0(blocks: torch.Tensor) -> Integers:
    scale = halves(blocks, 0, 2)
    nothing = torch.full_like(scale, -0.0)  # adding it keeps even the sign of a zero
    return Integers("q4", 8.0, _nibbles(blocks[:, 2:]), scale, nothing)


def _q4_1(blocks: torch.Tensor) -> Integers:
    scale_and_low = halves(blocks, 0, 4)
    return Integers("q4", 0.0, _nibbles(blocks[:, 4:]), scale_and_low[:, :1], scale_and_low[:, 1:])


def _q4_k(blocks: torch.Tensor) -> Integers:
    factors = halves(blocks, 0, 4)
    scales, minima = six_bit_scales(blocks[:, 4:16])
    q = _nibbles(blocks[:, 16:].reshape(-1, 32))
    return Integers("q4_f32", 0.0, q, factors[:, :1] * scales, -(factors[:, 1:] * minima))


_SPLIT: dict[str, _Split] = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k}


def _is_plain(q: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether q * scale is a number everywhere, and its zeros are +0: what the kernels make of it.

    q [num_blocks, 32], scale [num_blocks, 1]
    """
    positive = (scale > 0) & scale.isfinite()
    nothing = ~((q != 0).any(dim=1, keepdim=True) | (scale != 0) | scale.signbit())
    return bool((positive | nothing).all())


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Quantised:
    """A matrix of `dtype` whose rows are still the blocks of a file."""

    blocks: torch.Tensor  # [n, bytes of a row] uint8
    kind: TensorType
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        rows, row_bytes = self.blocks.shape
        return rows, row_bytes // self.kind.block_bytes * self.kind.block_size

    def dense(self) -> torch.Tensor:
        """[n, k] of `dtype`; the bits that the loader gives for the tensor."""
        data = self.blocks.reshape(-1)
        info = TensorInfo("", self.shape, self.kind, 0, data.numel())
        return dequantise(data, info, self.dtype)

    def integers(self) -> Integers | None:
        """What is in the blocks; None for numbers that no quantiser writes."""
        n, k = self.shape
        found = _SPLIT[self.kind.name](self.blocks.reshape(-1, self.kind.block_bytes))
        if found.storage == "q8" and not _is_plain(found.q, found.scale):
            return None
        groups = (n, k // GROUP)
        return Integers(
            found.storage,
            found.zero,
            found.q.reshape(n, k).contiguous(),
            found.scale.reshape(groups).contiguous(),
            None if found.low is None else found.low.reshape(groups).contiguous(),
        )


Weight = torch.Tensor | Quantised


def can_stay(tensor: TensorInfo) -> bool:
    """Whether this tensor of a file can be a `Quantised`."""
    return len(tensor.shape) == 2 and tensor.type.name in _SPLIT


def dense(weight: Weight) -> torch.Tensor:
    return weight.dense() if isinstance(weight, Quantised) else weight


def padded(weight: Weight, num_rows: int) -> Weight:
    """The same with rows of zeros below it, if it has fewer than `num_rows`."""
    missing = num_rows - weight.shape[0]
    if missing == 0:
        return weight
    if isinstance(weight, Quantised):
        return replace(weight, blocks=_with_zeros(weight.blocks, missing))
    return _with_zeros(weight, missing)


def _with_zeros(rows: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([rows, rows.new_zeros(count, *rows.shape[1:])])


def stacked(weights: Sequence[Weight]) -> Weight:
    """The rows of all, one after the other; quantised if all are, and in the same way."""
    first = weights[0]
    alike = [
        one.blocks
        for one in weights
        if isinstance(one, Quantised) and isinstance(first, Quantised) and one.kind == first.kind
    ]
    if isinstance(first, Quantised) and len(alike) == len(weights):
        return replace(first, blocks=torch.cat(alike))
    return torch.cat([dense(one) for one in weights])
