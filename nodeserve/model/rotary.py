"""Rotary position tables, with the stretchings that Llama-family checkpoints ask for."""

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


def frequencies(config: ModelConfig) -> torch.Tensor:
    """[head_dim / 2] float64: radians per position."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
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
    raise ModelError(
        f"rope scaling {scaling.kind!r} is not supported; supported: linear, llama3, factors"
    )


def tables(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [max_position, head_dim / 2] float32, computed in float64."""
    positions = torch.arange(config.max_position, dtype=torch.float64)
    angles = torch.outer(positions, frequencies(config))
    return angles.cos().float(), angles.sin().float()
