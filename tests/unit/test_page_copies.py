"""Copies of pages that never end: the worker finds it, since nobody else can see it."""

from typing import Any

import pytest

from nodeserve.errors import CudaError
from nodeserve.worker.contract import Landed
from nodeserve.worker.page_copies import (
    LONGEST_LOOK_S,
    STUCK_S,
    Blocks,
    PageCopies,
    Part,
    whole_block,
)
from nodeserve.worker.watcher import Watcher

BLOCK_BYTES = 256
MEMORY = Blocks(0, 4096, BLOCK_BYTES)


class Event:
    """`over`, all together: the copies that a test lets end."""

    over = False

    def __init__(self, device: int, timed: bool = False) -> None: ...

    def record(self, stream: int) -> None: ...

    def done(self) -> bool:
        return self.over

    def elapsed_ms(self, began: "Event") -> float:
        return 1.0


class Cuda:
    """As much of `_cuda` as copies need, on a device that does nothing by itself."""

    CudaError = CudaError

    class Stream:
        handle = 0

        def __init__(self, device: int) -> None: ...

    def __init__(self) -> None:
        self.Event: type[Event] = type("OneTestsEvent", (Event,), {})

    def copy_pages(self, *_: Any, **__: Any) -> None: ...


class Copies:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.cuda = Cuda()
        watcher = Watcher("copies", lambda: None)
        self._copies = PageCopies(self.cuda, 0, watcher, lambda: self.now_s)

    def begin(self, request_id: int) -> None:
        parts = [Part(MEMORY, whole_block(BLOCK_BYTES))]
        self._copies.begin(request_id, MEMORY, parts, [0, 1], [2, 3])

    def look_after(self, seconds: float) -> list[int]:
        """The requests whose copies ended."""
        self.now_s += seconds
        moved = self._copies.poll()
        assert all(isinstance(one, Landed) for one in moved)
        return [one.request_id for one in moved]


def test_a_copy_that_never_ends_ends_the_worker() -> None:
    """Pages that peers could read already kept the coordinator from seeing it: with these alone a
    worker may have nothing that it can do."""
    copies = Copies()
    copies.begin(1)
    for _ in range(int(STUCK_S)):
        assert copies.look_after(1.0) == []
        copies.begin(2)  # those behind it are no sign of life
    with pytest.raises(CudaError, match=f"{2 * BLOCK_BYTES} bytes of pages has not ended in 60 s"):
        copies.look_after(1.0)


def test_only_time_counts_in_which_somebody_looked() -> None:
    copies = Copies()
    copies.begin(1)
    for _ in range(int(STUCK_S / LONGEST_LOOK_S)):
        assert copies.look_after(100 * STUCK_S) == []
    with pytest.raises(CudaError):
        copies.look_after(LONGEST_LOOK_S)


def test_one_that_ends_and_a_rest_count_anew() -> None:
    copies = Copies()
    for request_id in range(5):
        copies.begin(request_id)
        for _ in range(int(STUCK_S) - 1):
            assert copies.look_after(1.0) == []
        copies.cuda.Event.over = True
        assert copies.look_after(1.0) == [request_id]
        copies.cuda.Event.over = False
        for _ in range(int(STUCK_S) + 1):
            assert copies.look_after(1.0) == []
