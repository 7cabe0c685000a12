"""The edge to torch and CUDA: all that a GPU worker asks of them, in one small interface.

Executor, staging, pool and transfer are written against `Runtime`, so tests run them on a machine
without a GPU. Work that is submitted runs in order, later than the call that submits it: nobody may
read its results, or write over its inputs, before its `Mark` is done.
"""

import gc
from collections.abc import Callable
from typing import Any, Protocol

import torch

from nodeserve import cuda_build
from nodeserve.errors import ConfigError
from nodeserve.worker.sizing import CONTEXT_BYTES, GpuMemory

Work = Callable[[], None]


class Mark(Protocol):
    """A point in the submitted work."""

    def query(self) -> bool:
        """Whether everything before it is over."""

    def synchronize(self) -> None:
        """Wait until it is. From any thread."""


class Runtime(Protocol):
    """One GPU as its worker sees it."""

    device: torch.device
    index: int  # among the visible GPUs: ours is the first
    cuda: Any  # nodeserve._cuda

    def submit(self, work: Work) -> Mark:
        """Run `work` behind all that was submitted before."""

    def mark(self) -> Mark:
        """Behind all that the device was given so far."""

    def capture(self, work: Work) -> Work:
        """`work`, recorded: call the result inside a submitted work to run it again.

        RuntimeError when it does something that cannot be recorded.
        """

    def pinned(self, num_values: int, dtype: torch.dtype) -> torch.Tensor:
        """[num_values] zeros in host memory that the device reads and writes by itself."""

    def view(self, pool: Any) -> torch.Tensor:
        """[num_bytes] uint8 on the device over a _cuda.Pool, which lives as long as the view."""

    def trim(self) -> None:
        """Give back memory that was dropped, so that `memory` counts what later steps take."""

    def memory(self) -> GpuMemory:
        """Once what was submitted is over."""

    def thread_begins(self) -> None:
        """Called first in every thread that uses marks or CUDA objects."""


class CudaRuntime:
    """The real one."""

    def __init__(self) -> None:
        self.index = 0
        self.cuda = _extension()
        if not torch.cuda.is_available():
            raise ConfigError(
                "torch sees no GPU here: check the driver and that torch is a CUDA build"
                " (`nodeserve doctor`), or use --device cpu"
            )
        self.device = torch.device("cuda", self.index)
        torch.cuda.set_device(self.device)
        # Not the default stream: that one waits for all others, and cannot be captured.
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(self._stream)
        self._graph_memory = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def submit(self, work: Work) -> Mark:
        with torch.inference_mode():
            work()
        return self.mark()

    def mark(self) -> Mark:
        # Blocking: who waits for a step sleeps instead of spinning on a core.
        mark = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        mark.record(self._stream)
        return mark

    def capture(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # For good, also where the capture fails: some releases of torch take the stream's workspace
        # for matrix products away when any graph of the stream goes, also from those that stay.
        self._graphs.append(graph)
        torch.cuda.synchronize(self.device)
        # Not torch.cuda.graph(): it collects garbage before each capture, half a second for 35.
        # thread_local: another thread of ours may wait for an event meanwhile.
        # No collection meanwhile: what goes then may give memory back, and that ends a capture.
        gc.disable()
        graph.capture_begin(pool=self._graph_memory, capture_error_mode="thread_local")
        try:
            with torch.inference_mode():
                work()
        finally:
            graph.capture_end()
            gc.enable()
        replay: Work = graph.replay
        return replay

    def pinned(self, num_values: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(num_values, dtype=dtype, pin_memory=True)

    def view(self, pool: Any) -> torch.Tensor:
        return torch.as_tensor(_Memory(pool), device=self.device)

    def trim(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def memory(self) -> GpuMemory:
        torch.cuda.synchronize(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        return GpuMemory(total, free, torch.cuda.memory_reserved(self.device) + CONTEXT_BYTES)

    def thread_begins(self) -> None:
        torch.cuda.set_device(self.device)


class _Memory:
    """A pool in the words that torch takes memory over with; the tensor keeps this, and this it."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.__cuda_array_interface__ = {
            "shape": (pool.num_bytes,),
            "typestr": "|u1",
            "data": (pool.address, False),
            "strides": None,
            "version": 3,
        }


def _extension() -> Any:
    try:
        from nodeserve import _cuda
    except ImportError as problem:
        reason = cuda_build.why_not() or f"cannot be loaded: {problem}"
        raise ConfigError(f"nodeserve._cuda {reason}; or use --device cpu") from None
    return _cuda
