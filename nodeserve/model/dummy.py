"""Random weights for a model's shape: `--load-format dummy`, for benchmarks and tests.

A value is a hash of the tensor's name and its own place in it, in integers that every device wraps
the same way, and then one product of two floats: so the bits are the same in every process and on
every device, and nothing is read. 8 billion values are some tens of passes over memory.

The scales keep a deep model sane: every linear keeps the size of what it reads, what joins the
residual stream shrinks with the depth, and logits have a spread of about one.
"""

import hashlib
import math

import torch

from nodeserve.config import ModelConfig
from nodeserve.errors import ModelError
from nodeserve.model.families import shape_of
from nodeserve.model.part import Part

CHUNK = 1 << 24  # values made at once: 64 MiB of integers
_UNIFORM_STD = 1.0 / math.sqrt(3.0)  # of the interval [-1, 1)
_BIAS_STD = 0.02
_INTO_RESIDUAL = ("o_proj.weight", "down_proj.weight", "w2.weight", "out_proj.weight", "fc2.weight")
_ALL = Part(0, range)


def std_of(config: ModelConfig, name: str, shape: tuple[int, ...]) -> float | None:
    """Spread of a tensor's values; None for one that is all ones."""
    if name.endswith(".bias"):
        return _BIAS_STD
    if len(shape) == 1:
        return None
    if name == "model.embed_tokens.weight" and not config.tie_embeddings:
        return 1.0
    std = 1.0 / math.sqrt(shape[1])
    if name.endswith(_INTO_RESIDUAL):
        std /= math.sqrt(2 * config.num_layers)
    return std


def random_tensor(
    name: str,
    shape: tuple[int, ...],
    std: float,
    dtype: torch.dtype,
    device: torch.device,
    rows: range | None = None,
) -> torch.Tensor:
    """Uniform values with mean 0; the same bits for the same name, shape and std everywhere.

    With `rows`, only those of the first dimension are made.
    """
    rows = range(shape[0]) if rows is None else rows
    start = rows.start * math.prod(shape[1:])
    values = torch.empty(len(rows) * math.prod(shape[1:]), dtype=dtype, device=device)
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    seeds = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    scale = std / _UNIFORM_STD / 2.0**31
    for first in range(0, values.numel(), CHUNK):
        part = values[first : first + CHUNK]
        at = start + first
        places = torch.arange(at, at + part.numel(), dtype=torch.int32, device=device)
        part.copy_(_mixed(places, seeds).to(torch.float32).mul_(scale))
    return values.view(len(rows), *shape[1:])


def _mixed(places: torch.Tensor, seeds: tuple[int, int]) -> torch.Tensor:
    """A hash of each int32 in all of its 32 bits, in place: multiply and fold, again and again."""
    places.mul_(_signed(0x9E3779B1)).add_(_signed(seeds[0]))
    places.bitwise_xor_(places.bitwise_right_shift(15)).add_(_signed(seeds[1]))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 0x9E3779B1)):
        folded = places.bitwise_right_shift(shift).bitwise_and_((1 << (32 - shift)) - 1)
        places.bitwise_xor_(folded).mul_(_signed(factor))
    return places


def _signed(bits: int) -> int:
    """The int32 with these 32 bits."""
    return bits - (1 << 32) if bits >= 1 << 31 else bits


class DummyWeights:
    """What model.loader.Weights is for files: tensors by hub name, made when asked for."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self._config = config
        self._dtype = dtype
        self._device = torch.device(device)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and shape_of(self._config, name) is not None

    def __call__(self, name: str, part: Part | None = None) -> torch.Tensor:
        """The tensor called `name`, on the device."""
        shape = shape_of(self._config, name)
        if shape is None:
            raise ModelError(f"a {self._config.architecture} of this shape has no tensor {name}")
        rows, *columns = (part or _ALL).within(shape)
        std = std_of(self._config, name, shape)
        if std is None:
            return torch.ones(rows.stop - rows.start, dtype=self._dtype, device=self._device)
        values = random_tensor(
            name, shape, std, self._dtype, self._device, range(rows.start, rows.stop)
        )
        return values[(slice(None), *columns)].contiguous()
