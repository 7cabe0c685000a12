"""python -m tests.fakes.cuda_worker --spec JSON: a GPU worker's process without a GPU.

Loading, executor, staging, graphs, pool, kernels (interpreted) and transfer are the real ones; the
runtime edge is fake. With NODESERVE_FAKE_PLAIN_PARTS in the environment the model is plain torch as
well: ten times as fast, for tests that are about everything else.
"""

import os
import sys
from typing import TYPE_CHECKING

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported

from nodeserve.config import ModelConfig, WorkerSpec
from nodeserve.worker.contract import Device, Progress, Team
from nodeserve.worker.device import uncollected
from nodeserve.worker.process import main

if TYPE_CHECKING:
    import torch

    from nodeserve.worker.gpu_model import GpuParts
    from nodeserve.worker.gpu_runtime import Runtime

PLAIN_PARTS = "NODESERVE_FAKE_PLAIN_PARTS"


def plain_feed(token_ids: "torch.Tensor", feed: "torch.Tensor", sampled: "torch.Tensor") -> None:
    fed = feed >= 0
    token_ids[fed] = sampled[feed[fed]]


def plain_parts(
    spec: WorkerSpec, config: ModelConfig, dtype: "torch.dtype", runtime: "Runtime"
) -> "GpuParts":
    from nodeserve.model.ops_torch import TorchOps
    from nodeserve.worker.constraints import Constraints
    from nodeserve.worker.gpu_model import GpuParts
    from nodeserve.worker.sampler_gpu import GpuSampler

    constraints = Constraints.of_worker(spec, config)
    sampler = GpuSampler(runtime.device, spec.max_num_seqs, constraints)
    return GpuParts(TorchOps(dtype), sampler, plain_feed, capturable=True, description="plain")


def load(spec: WorkerSpec, progress: Progress, team: Team) -> Device:
    with uncollected():
        import torch

        import tests.fakes.interpreter  # noqa: F401  repairs it
        from nodeserve.worker import device_cuda
        from nodeserve.worker.gpu_model import make_parts
        from tests.fakes.gpu_runtime import FakeRuntime

    torch.set_num_threads(1)  # small operations, and workers that share the cores
    parts = plain_parts if PLAIN_PARTS in os.environ else make_parts
    return device_cuda.load(spec, progress, team, FakeRuntime(), parts)


if __name__ == "__main__":
    sys.exit(main(load))
