"""Which operations run a model: the native kernels where they can, plain torch where not."""

from collections.abc import Sequence

import torch

from nodeserve.config import ModelConfig
from nodeserve.errors import ModelError
from nodeserve.model.ops import Ops
from nodeserve.model.ops_cpu import DTYPE_NAMES, CpuOps, refusal
from nodeserve.model.ops_torch import TorchOps


def make_ops(
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    block_size: int = 16,
    num_threads: int = 1,
    cpus: Sequence[int] = (),
    isa: str = "",
) -> Ops:
    """Operations on the CPU. Every worker of a node gets the same kind for the same model."""
    if dtype not in DTYPE_NAMES:
        names = ", ".join(DTYPE_NAMES.values())
        raise ModelError(f"dtype {dtype} is not supported on CPU; supported: {names}")
    if config.foreign is not None or refusal(config, block_size) is not None:
        return TorchOps(dtype)
    return CpuOps(config, dtype, num_threads, cpus, isa)
