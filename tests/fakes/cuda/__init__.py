"""The module `nodeserve._cuda` for machines without a GPU: the real csrc/kv over a fake runtime.

`load_fake_cuda()` compiles csrc/kv with the host compiler against include/cuda_runtime.h (once per
change of a source; the module is kept under build/fake_cuda), imports it and puts it where
`nodeserve._cuda` is found. A worker process of a test calls it before it imports anything that
needs `_cuda`. Addresses of "device" memory are ordinary addresses, so numpy and torch may look at
it through ctypes. What the runtime imitates is set by the environment, read once per process:

    NODESERVE_FAKE_CUDA_DEVICES       how many devices there are (2); 0: none
    CUDA_VISIBLE_DEVICES              as CUDA reads it, numbers only
    NODESERVE_FAKE_CUDA_MEMORY_BYTES  of each device, per process (1 GiB)
    NODESERVE_FAKE_CUDA_PEERS         all, none, or pairs of devices: 0-1,2-3
    NODESERVE_FAKE_CUDA_MODE          threaded (streams go on by themselves, in random order) or
                                      lazy (nothing runs before somebody waits, and then only what
                                      that needs: a missing event wait reads old memory each time)
    NODESERVE_FAKE_CUDA_SEED          of the random orders
    NODESERVE_FAKE_CUDA_FAIL          function:call:number,...  fail that call once

`nodeserve._cuda.fake` has what tests ask of it: `fail(function, call, number)`, `calls(function)`,
`fill(stream, address, value, num_bytes)` (work for a stream), `last_batch()` (target, source, bytes
of its copies), `last_grid()` (thread blocks), `num_pending()` (jobs), `num_allocations()`,
`current_device()`, and `reload_environment()`, which first finishes all work.

Its limits: memory is counted per process, and nobody stops a kernel that reads a device it has no
access to.
"""

from tests.fakes.cuda.build import load_fake_cuda
from tests.fakes.cuda.memory import bytes_at

__all__ = ["bytes_at", "load_fake_cuda"]
