"""What a GPU worker's model is made of: operations, attention, sampler, for one setting."""

from dataclasses import dataclass

import torch

from nodeserve.config import ModelConfig, WorkerSpec
from nodeserve.model.gpu.attention.paged import PagedAttention
from nodeserve.model.gpu.attention.reference import ReferenceAttention
from nodeserve.model.gpu.ops import CudaOps
from nodeserve.model.gpu.pointwise import feed_tokens
from nodeserve.model.ops import Ops
from nodeserve.policy.batching import Work
from nodeserve.worker.contract import Sampled
from nodeserve.worker.executor_cuda import FeedTokens, Launched, Sampler
from nodeserve.worker.gpu_runtime import Runtime
from nodeserve.worker.sampler import sample


@dataclass(frozen=True, slots=True)
class GpuParts:
    ops: Ops
    sampler: Sampler
    feed_tokens: FeedTokens
    description: str  # of the attention, for the start log and `status`


class _TempLaunched:
    def __init__(self, sampled: Sampled) -> None:
        self.sampled = sampled
        self.tokens = torch.tensor(sampled.token_ids, dtype=torch.int32)

    def result(self) -> Sampled:
        return self.sampled


class _TempSampler:
    def launch(self, logits: torch.Tensor, work: list[Work]) -> Launched:
        return _TempLaunched(sample(logits, [one.sequence for one in work]))


def make_parts(
    spec: WorkerSpec, config: ModelConfig, dtype: torch.dtype, runtime: Runtime
) -> GpuParts:
    part = ReferenceAttention()
    attention = PagedAttention(part, part, "reference")
    return GpuParts(CudaOps(dtype, runtime.device, attention), _TempSampler(), feed_tokens, "reference")
