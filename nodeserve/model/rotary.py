"""Rotary position tables, with the stretchings that checkpoints ask for."""

import math

import torch

from nodeserve.config import ModelConfig, RopeScaling
from nodeserve.errors import ModelError


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Slow frequencies are divided by the factor, fast ones kept, those between blended."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position / wavelengths
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def _yarn(frequencies: torch.Tensor, base: float, scaling: RopeScaling) -> torch.Tensor:
    """Fast frequencies are kept, slow ones divided; between, the place says how much."""
    half = frequencies.numel()

    def place_of(turns: float) -> float:
        """Where in the list a frequency would be that turns so often in the original context."""
        wavelength = scaling.original_max_position / (2 * math.pi * turns)
        return half * math.log(wavelength) / math.log(base)

    first, last = place_of(scaling.beta_fast), place_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    width = last - first or 0.001
    divided = ((torch.arange(half, dtype=torch.float64) - first) / width).clamp(0.0, 1.0)
    return frequencies * (divided / scaling.factor + (1.0 - divided))


def frequencies(config: ModelConfig) -> torch.Tensor:
    """[rope_dim / 2] float64: radians per position."""
    exponents = torch.arange(0, config.rope_dim, 2, dtype=torch.float64) / config.rope_dim
    plain = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(plain, scaling)
    if scaling.kind == "factors":
        return plain / torch.tensor(scaling.frequency_factors, dtype=torch.float64)
    if scaling.kind == "yarn":
        return _yarn(plain, config.rope_theta, scaling)
    raise ModelError(
        f"rope scaling {scaling.kind!r} is not supported; supported: linear, llama3, factors, yarn"
    )


def tables(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [max_position, rope_dim / 2] float32, computed in float64."""
    positions = torch.arange(config.max_position, dtype=torch.float64)
    angles = torch.outer(positions, frequencies(config))
    size = config.rope_scaling.attention_factor if config.rope_scaling else 1.0
    return angles.cos().mul_(size).float(), angles.sin().mul_(size).float()
