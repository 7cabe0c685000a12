"""Turns packed GGUF blocks into torch numbers, bit-equal to the `gguf` package.

The types that most files use have torch code here; the `gguf` package does the others. Blocks are
worked on in chunks whose fp32 values stay in the cache: the memory of a whole fp32 tensor would be
touched once and thrown away, and its page faults cost more than the arithmetic.

Every product and sum is its own operation. A fused multiply-add would round once instead of twice
and no longer give the reference's bits.
"""

import importlib
from collections.abc import Callable
from math import prod

import torch

from nodeserve.errors import ModelError
from nodeserve.gguf import TensorInfo

# A little less than the 32,768 values from which torch uses its threads: so many small operations
# would spend their time waiting for each other when another process has one of the cores.
_CHUNK_VALUES = 32 * 1024 - 256

# [num_blocks, block_bytes] uint8, to be written to [num_blocks, block_size] fp32
Unpack = Callable[[torch.Tensor, torch.Tensor], None]


def halves(blocks: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Bytes start:stop of each block as fp16 numbers, in fp32."""
    return blocks[:, start:stop].contiguous().view(torch.float16).float()


def _q8_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    torch.mul(blocks[:, 2:].view(torch.int8), halves(blocks, 0, 2), out=out)


def _q4_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    scale = halves(blocks, 0, 2)
    packed = blocks[:, 2:]
    out[:, :16] = packed & 15
    out[:, 16:] = packed >> 4
    out.sub_(8.0).mul_(scale)


def _q4_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    scale_and_min = halves(blocks, 0, 4)
    scale, low = scale_and_min[:, :1], scale_and_min[:, 1:]
    packed = blocks[:, 4:]
    torch.mul(packed & 15, scale, out=out[:, :16])
    torch.mul(packed >> 4, scale, out=out[:, 16:])
    out.add_(low)


def six_bit_scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 8 scales and 8 minima in 12 bytes of the K types: low ones whole, high ones split."""
    first, second, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([first & 63, (high & 15) | ((first >> 2) & 48)], dim=1)
    minima = torch.cat([second & 63, (high >> 4) | ((second >> 2) & 48)], dim=1)
    return scales, minima


def _q4_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    factors = halves(blocks, 0, 4)
    scales, minima = six_bit_scales(blocks[:, 4:16])
    scale = (factors[:, :1] * scales).unsqueeze(-1)
    low = (factors[:, 1:] * minima).unsqueeze(-1)
    packed = blocks[:, 16:].view(-1, 4, 1, 32)
    groups = out.view(-1, 4, 2, 32)
    groups[:, :, :1] = packed & 15
    groups[:, :, 1:] = packed >> 4
    out.view(-1, 8, 32).mul_(scale).sub_(low)


def _q6_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    low = blocks[:, :128].view(-1, 2, 1, 64)
    high = blocks[:, 128:192].view(-1, 2, 1, 32)
    scales = blocks[:, 192:208].view(torch.int8) * halves(blocks, 208, 210)
    nibbles = torch.cat([low & 15, low >> 4], dim=2).view(-1, 2, 4, 32)
    pairs = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], dim=2)
    out.copy_((nibbles | (pairs << 4)).view(-1, 256)).sub_(32.0)
    out.view(-1, 16, 16).mul_(scales.unsqueeze(-1))


_UNPACK: dict[str, Unpack] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def dequantise(data: torch.Tensor, tensor: TensorInfo, dtype: torch.dtype) -> torch.Tensor:
    """The tensor whose packed bytes are `data` [num_bytes] uint8; memory of its own."""
    kind = tensor.type
    if kind.name in _PLAIN:
        return data.view(_PLAIN[kind.name]).to(dtype, copy=True).view(tensor.shape)
    unpack = _UNPACK.get(kind.name) or _reference(tensor)
    blocks = data.view(-1, kind.block_bytes)
    values = torch.empty(prod(tensor.shape), dtype=dtype).view(-1, kind.block_size)
    rows = _CHUNK_VALUES // kind.block_size
    scratch = torch.empty(min(rows, len(blocks)), kind.block_size)
    for start in range(0, len(blocks), rows):
        chunk = blocks[start : start + rows]
        numbers = scratch[: len(chunk)]
        unpack(chunk, numbers)
        values[start : start + rows].copy_(numbers)
    return values.view(tensor.shape)


def _reference(tensor: TensorInfo) -> Unpack:
    """The `gguf` package's code for a type; imported only now, since few files need it."""
    quants = importlib.import_module("gguf.quants")
    numpy = importlib.import_module("numpy")
    try:
        kind = quants.GGMLQuantizationType[tensor.type.name]
        quants.dequantize(numpy.zeros(tensor.type.block_bytes, numpy.uint8), kind)
    except (KeyError, NotImplementedError):
        raise ModelError(
            f"tensor {tensor.name} is of type {tensor.type.name}, which the installed gguf "
            "package cannot dequantise"
        ) from None

    def unpack(blocks: torch.Tensor, out: torch.Tensor) -> None:
        with numpy.errstate(all="ignore"):
            out.copy_(torch.from_numpy(quants.dequantize(blocks.numpy(), kind)))

    return unpack
