"""The runtime edge of a GPU worker on a machine without one: torch on the CPU, late.

Submitted work waits in a queue until somebody waits for its mark, in whatever thread that is; a
"captured" step is its function, run again. So a buffer that is written over too early, a block that
is freed too early or a token that is read too early changes what comes out. Device memory, copies
and events are the fake CUDA runtime's.
"""

import ctypes
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from nodeserve.worker.gpu_runtime import Work
from nodeserve.worker.sizing import GpuMemory
from tests.fakes.cuda import load_fake_cuda

TOTAL_BYTES = 4 << 30


class FakeMark:
    """A place in the queue."""

    def __init__(self, queue: "WorkQueue", place: int) -> None:
        self._queue = queue
        self._place = place

    def query(self) -> bool:
        return self._queue.num_done >= self._place

    def synchronize(self) -> None:
        self._queue.run_to(self._place)


class WorkQueue:
    """Work in the order of its submission, run by who waits for it."""

    def __init__(self) -> None:
        self.num_done = 0
        self._waiting: deque[Work] = deque()
        self._num_given = 0
        self._lock = threading.Lock()
        self._problem: BaseException | None = None

    def give(self, work: Work) -> int:
        self._waiting.append(work)
        self._num_given += 1
        return self._num_given

    @property
    def num_given(self) -> int:
        return self._num_given

    def run_to(self, place: int) -> None:
        with self._lock:
            while self.num_done < place and self._problem is None:
                try:
                    with torch.inference_mode():
                        self._waiting[0]()
                except BaseException as problem:  # noqa: BLE001 whoever waits gets it
                    self._problem = problem
                self._waiting.popleft()
                self.num_done += 1
        if self._problem is not None:
            raise RuntimeError("work on the fake device failed") from self._problem


class FakeRuntime:
    """What gpu_runtime.Runtime describes."""

    def __init__(self, fails_to_capture: Callable[[int], bool] = lambda nth: False) -> None:
        """fails_to_capture: by the number of the capture, from 0."""
        self.index = 0
        self.device = torch.device("cpu")
        self.cuda: Any = load_fake_cuda()
        self.queue = WorkQueue()
        self._num_captures = 0
        self._fails_to_capture = fails_to_capture

    def submit(self, work: Work) -> FakeMark:
        return FakeMark(self.queue, self.queue.give(work))

    def mark(self) -> FakeMark:
        """Work that was not submitted is done at once; what was submitted before comes first."""
        place = self.queue.num_given
        self.queue.run_to(place)
        return FakeMark(self.queue, place)

    def capture(self, work: Work) -> Work:
        nth, self._num_captures = self._num_captures, self._num_captures + 1
        if self._fails_to_capture(nth):
            raise RuntimeError("operation not permitted when stream is capturing")
        with torch.inference_mode():
            work()  # so that it leaves its views, as a recorded one does
        return work

    def pinned(self, num_values: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(num_values, dtype=dtype)

    def view(self, pool: Any) -> torch.Tensor:
        memory = (ctypes.c_ubyte * pool.num_bytes).from_address(pool.address)
        memory.pool = pool  # lives as long as the view
        return torch.frombuffer(memory, dtype=torch.uint8)

    def trim(self) -> None:
        self.mark()

    def memory(self) -> GpuMemory:
        self.mark()
        return GpuMemory(TOTAL_BYTES, TOTAL_BYTES // 2, TOTAL_BYTES // 8)

    def thread_begins(self) -> None:
        pass
