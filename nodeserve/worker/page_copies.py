"""Copies of blocks or parts of them on a stream of their own: begun, watched, timed, waited for."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nodeserve.errors import CudaError, HandoffFailed
from nodeserve.policy.copy_plan import CopyRun
from nodeserve.worker.contract import CopyFailed, Landed
from nodeserve.worker.watcher import Watcher

STUCK_S = 60.0  # that no copy ends while some are under way: the slowest takes a tenth of a second
LONGEST_LOOK_S = (
    2.0  # what counts of the time between two looks: a loop that stood still saw nothing
)


Runs = npt.NDArray[np.int64]
"""[n, 3]: an offset in the target block, one in the source block, and bytes."""


class Blocks(NamedTuple):
    """Memory in which blocks lie one after the other."""

    address: int
    num_blocks: int
    block_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


class Part(NamedTuple):
    """What is copied of each block from one memory, behind the event `after`."""

    source: Blocks
    runs: Runs
    after: Any | None = None


def as_runs(runs: Sequence[CopyRun]) -> Runs:
    return np.array(runs, np.int64)


def whole_block(num_bytes: int) -> Runs:
    """Of this size, on both sides."""
    return as_runs([CopyRun(0, 0, num_bytes)])


@dataclass(slots=True)
class _Copy:
    request_id: int
    num_bytes: int
    began: Any  # timed events
    ended: Any


class PageCopies:
    """Copies that end in the order of their beginnings; several may be under way.

    An error of CUDA fails the request alone as long as the stream still works afterwards; else it
    goes through, and the worker with it. So it does if the first copy never ends: all others wait
    behind it, and the coordinator cannot tell one from pages that wait for room. `clock` is
    monotonic, in seconds.
    """

    def __init__(
        self,
        cuda: Any,
        device: int,
        watcher: Watcher,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cuda = cuda
        self._device = device
        self._watcher = watcher
        self._stream = cuda.Stream(device)
        self._under_way: deque[_Copy] = deque()
        self._spare: list[tuple[Any, Any]] = []  # pairs of timed events
        self._clock = clock
        self._looked_s = clock()
        self._stood_s = 0.0  # looked at, with copies under way, since one ended

    def begin(
        self,
        request_id: int,
        target: Blocks,
        parts: Sequence[Part],
        target_ids: Sequence[int],
        source_ids: Sequence[int],
    ) -> None:
        """Copy the parts of block source_ids[i] to target_ids[i].

        HandoffFailed if it cannot be begun: then nothing is written any more.
        """
        pairs = np.array([target_ids, source_ids], np.int32).T.copy()
        try:
            began, ended = self._spare.pop() if self._spare else self._new_events()
            self._launch(pairs, target, parts, began, ended)
        except self._cuda.CudaError as problem:
            self.settle()
            raise HandoffFailed(f"the pages cannot be copied: {problem}") from None
        num_bytes = len(pairs) * sum(int(part.runs[:, 2].sum()) for part in parts)
        self._under_way.append(_Copy(request_id, num_bytes, began, ended))

    def poll(self) -> list[Landed | CopyFailed]:
        """The copies that ended since the last time. CudaError if none does any more."""
        over: list[Landed | CopyFailed] = []
        while self._under_way:
            copy = self._under_way[0]
            try:
                if not copy.ended.done():
                    break
                seconds = copy.ended.elapsed_ms(copy.began) / 1e3
            except self._cuda.CudaError as problem:
                self.settle()
                failure = HandoffFailed(f"copying the pages failed: {problem}")
                over.append(CopyFailed(copy.request_id, failure))
            else:
                over.append(Landed(copy.request_id, copy.num_bytes, seconds))
                self._spare.append((copy.began, copy.ended))
            self._under_way.popleft()
        self._judge(moved=bool(over))
        return over

    def _judge(self, moved: bool) -> None:
        now_s = self._clock()
        looked_s, self._looked_s = min(now_s - self._looked_s, LONGEST_LOOK_S), now_s
        self._stood_s = 0.0 if moved or not self._under_way else self._stood_s + looked_s
        if self._stood_s > STUCK_S:
            first = self._under_way[0]
            raise CudaError(
                f"a copy of {first.num_bytes} bytes of pages has not ended in {STUCK_S:g} s"
            )

    def drop(self, request_id: int) -> None:
        """Wait for a request's copy, if there is one, and forget it."""
        for copy in self._under_way:
            if copy.request_id == request_id:
                try:
                    copy.ended.synchronize()
                except self._cuda.CudaError:
                    self.settle()
                self._under_way.remove(copy)
                return

    def settle(self) -> None:
        """Wait for all copies. CudaError if the device does not work any more."""
        self._stream.synchronize()

    def _new_events(self) -> tuple[Any, Any]:
        event = self._cuda.Event
        return event(self._device, timed=True), event(self._device, timed=True)

    def _launch(
        self, pairs: Any, target: Blocks, parts: Sequence[Part], began: Any, ended: Any
    ) -> None:
        stream = self._stream.handle
        for part in parts:
            if part.after is not None:
                part.after.make_wait(stream)
        began.record(stream)
        for source, runs, _ in parts:
            self._cuda.copy_pages(
                target.address,
                target.num_bytes,
                source.address,
                source.num_bytes,
                pairs,
                runs,
                target_stride=target.block_bytes,
                source_stride=source.block_bytes,
                stream=stream,
            )
        ended.record(stream)
        # One of the watcher's own: these two may serve another copy while it still waits.
        signal = self._cuda.Event(self._device)
        signal.record(stream)
        self._watcher.watch(signal)
