"""A thread that sleeps for a simulated device, and wakes the step loop when something is over."""

import heapq
import os
import select
import threading
import time
from collections.abc import Callable


class Alarm:
    """Wakes the loop at the times that it is given; its bell may be rung from other processes too.

    `bell_fd` is an eventfd and stays the caller's. `clock` is monotonic, in seconds.
    """

    def __init__(self, bell_fd: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._bell_fd = bell_fd
        self._clock = clock
        self._times: list[float] = []  # a heap
        self._lock = threading.Lock()
        self._look: Callable[[], float | None] = lambda: None
        self._wake: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, name="alarm", daemon=True)

    def start(self, look: Callable[[], float | None], wake: Callable[[], None]) -> None:
        """`look` is called in the thread, now and after each ring: it says when to `wake` the loop,
        or None if the ring was about nothing."""
        self._look, self._wake = look, wake
        self._thread.start()

    def wake_at(self, time_s: float) -> None:
        """Wake the loop at this time; from any thread."""
        self._add(time_s)
        os.eventfd_write(self._bell_fd, 1)

    def _add(self, time_s: float | None) -> None:
        if time_s is not None:
            with self._lock:
                heapq.heappush(self._times, time_s)

    def _run(self) -> None:
        # select counts microseconds, where poll has only milliseconds, but takes no descriptor
        # above 1023. An inherited one of a large node may be; the lowest free number is not.
        bell_fd = os.dup(self._bell_fd)
        self._add(self._look())
        while True:
            if select.select([bell_fd], [], [], self._left_s())[0]:
                os.eventfd_read(bell_fd)
                self._add(self._look())
            if self._drop_past():
                self._wake()

    def _left_s(self) -> float | None:
        with self._lock:
            return max(0.0, self._times[0] - self._clock()) if self._times else None

    def _drop_past(self) -> bool:
        """Whether there were times that are over by now."""
        any_past = False
        with self._lock:
            while self._times and self._times[0] <= self._clock():
                heapq.heappop(self._times)
                any_past = True
        return any_past
