"""What a GPU worker's model is made of: operations, attention, sampler, for one setting."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nodeserve.config import ModelConfig, WorkerSpec
from nodeserve.model.gpu.attention.latent_choice import make_latent_attention
from nodeserve.model.gpu.attention.latent_parts import latent_heads_of
from nodeserve.model.gpu.attention.paged import PagedAttention
from nodeserve.model.gpu.attention.probe import heads_of, make_attention, windows_of
from nodeserve.model.gpu.ops import CudaOps
from nodeserve.model.gpu.pointwise import feed_tokens
from nodeserve.model.ops import Ops
from nodeserve.worker.constraints import Constraints
from nodeserve.worker.executor_cuda import FeedTokens, Sampler
from nodeserve.worker.gpu_runtime import Runtime
from nodeserve.worker.sampler_gpu import GpuSampler


@dataclass(frozen=True, slots=True)
class GpuParts:
    """All that depends on what is installed and on what the GPU can do."""

    ops: Ops
    sampler: Sampler
    feed_tokens: FeedTokens
    capturable: bool  # whether a step of decodes can be a CUDA graph
    description: str  # of the attention, for the start log and `status`


MakeParts = Callable[[WorkerSpec, ModelConfig, torch.dtype, Runtime], GpuParts]


def make_parts(
    spec: WorkerSpec, config: ModelConfig, dtype: torch.dtype, runtime: Runtime
) -> GpuParts:
    """ConfigError where --attention-backend asks for what cannot be used here."""
    attention = _attention(spec, config, dtype, runtime.device)
    return GpuParts(
        ops=CudaOps(dtype, runtime.device, attention),
        sampler=GpuSampler(runtime.device, spec.max_num_seqs, Constraints.of_worker(spec, config)),
        feed_tokens=feed_tokens,
        # A CPU has no graphs: there a capture is only a function that is called again.
        capturable=attention.capturable or runtime.device.type == "cpu",
        description=attention.name,
    )


def _attention(
    spec: WorkerSpec, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> PagedAttention:
    wish = spec.attention_backend
    if config.mla is not None:
        latents = latent_heads_of(config, spec.block_size, dtype)
        return make_latent_attention(latents, device, wish)
    heads = heads_of(config, spec.block_size, dtype)
    return make_attention(heads, windows_of(config), device, wish)
