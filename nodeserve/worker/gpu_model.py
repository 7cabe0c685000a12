"""What a GPU worker's model is made of: operations, attention, sampler, for one setting."""

from dataclasses import dataclass

import torch

from nodeserve.config import ModelConfig, WorkerSpec
from nodeserve.model.gpu.attention.paged import PagedAttention
from nodeserve.model.gpu.attention.reference import ReferenceAttention
from nodeserve.model.gpu.ops import CudaOps
from nodeserve.model.gpu.pointwise import feed_tokens
from nodeserve.model.ops import Ops
from nodeserve.worker.executor_cuda import FeedTokens, Sampler
from nodeserve.worker.gpu_runtime import Runtime
from nodeserve.worker.sampler_gpu import GpuSampler


@dataclass(frozen=True, slots=True)
class GpuParts:
    ops: Ops
    sampler: Sampler
    feed_tokens: FeedTokens
    description: str  # of the attention, for the start log and `status`


def make_parts(
    spec: WorkerSpec, config: ModelConfig, dtype: torch.dtype, runtime: Runtime
) -> GpuParts:
    part = ReferenceAttention()
    attention = PagedAttention(part, part, "reference")
    sampler = GpuSampler(runtime.device, spec.max_num_seqs)
    return GpuParts(CudaOps(dtype, runtime.device, attention), sampler, feed_tokens, "reference")
