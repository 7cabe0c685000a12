"""python -m tests.fakes.cuda_worker --spec JSON: a GPU worker's process without a GPU.

Loading, executor, staging, graphs, pool, kernels (interpreted) and transfer are the real ones; the
runtime edge is fake.
"""

import os
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported

from nodeserve.config import WorkerSpec
from nodeserve.worker.contract import Device, Progress
from nodeserve.worker.process import main


def load(spec: WorkerSpec, progress: Progress) -> Device:
    from nodeserve.worker import device_cuda
    from tests.fakes.gpu_runtime import FakeRuntime

    return device_cuda.load(spec, progress, FakeRuntime())


if __name__ == "__main__":
    sys.exit(main(load))
