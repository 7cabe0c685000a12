"""python -m tests.fakes.worker --spec JSON: a real worker process around a fake model.

Rings, step loop, scheduler, page pool and handoff are the real ones; torch is never loaded.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from nodeserve.config import WorkerSpec
from nodeserve.errors import ModelError
from nodeserve.policy.blocks import blocks_for
from nodeserve.wire.ring import SemaphoreDoorbell
from nodeserve.worker.contract import Device, Progress, Team
from nodeserve.worker.handoff import SHARED_MEMORY, HostTransfer
from nodeserve.worker.pages import make_pool, num_blocks_in
from nodeserve.worker.process import main
from tests.fakes.faults import faulty
from tests.fakes.late_model import ThreadedExecutor
from tests.fakes.model import FakeExecutor, FakeSettings
from tests.fakes.pages import uncut

# It ends with the node: nobody else has that pipe's other end.
CHILD = ("sh", "-c", "while echo >&2; do sleep 0.05; done")


def load(spec: WorkerSpec, progress: Progress, team: Team) -> Device:
    settings = FakeSettings.parse(spec.model)
    if settings.oversleeps:
        wait = SemaphoreDoorbell.wait
        setattr(SemaphoreDoorbell, "wait", lambda bell, timeout_s: wait(bell, None))  # noqa: B010
    progress("weights", 0, 1)
    if settings.load_error is not None:
        raise ModelError(settings.load_error)
    if settings.weights is not None and not Path(settings.weights).exists():
        raise ModelError("no such weights")
    if settings.leaves_child:
        subprocess.Popen(CHILD)
    has_lived = os.fstat(spec.pages_fd).st_size > 0
    if load_s := settings.load_again_s if has_lived else settings.load_s:
        time.sleep(load_s)
    progress("weights", 1, 1)
    block_bytes = settings.block_bytes_for(spec.block_size)
    assert spec.kv_memory is not None
    num_blocks = num_blocks_in(
        spec.kv_memory, block_bytes, blocks_for(spec.max_model_len, spec.block_size)
    )
    num_blocks = min(num_blocks, settings.max_blocks)
    pool = make_pool(spec.pages_fd, num_blocks * block_bytes)
    executor = ThreadedExecutor if settings.overlaps else FakeExecutor
    return Device(
        executor=executor(settings, pool, spec.block_size, spec.index),
        transfer=HostTransfer(pool, block_bytes),
        num_blocks=num_blocks,
        block_bytes=block_bytes,
        pages=uncut(block_bytes),
        pages_bytes=num_blocks * block_bytes,
        pages_handle=b"",
        num_threads=spec.num_threads,
        kernels="fake",
        handoff=SHARED_MEMORY,
        eos_token_ids=frozenset(settings.eos_token_ids),
    )


if __name__ == "__main__":
    sys.exit(main(faulty(load)))
