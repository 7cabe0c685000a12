"""A thread that waits for the device and then wakes the step loop, which need not ask."""

import queue
import threading
from collections.abc import Callable
from typing import Protocol


class Waited(Protocol):
    """Something on the device that ends."""

    def synchronize(self) -> None: ...


class Watcher:
    """Waits for what it is given, in that order; the loop is woken once for each.

    An error on the device only wakes the loop: it meets the error itself, where it can answer it.
    """

    def __init__(self, name: str, begin: Callable[[], None]) -> None:
        self._begin = begin  # called once in the new thread
        self._wake: Callable[[], None] | None = None
        self._given: queue.SimpleQueue[Waited] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        if not self._thread.is_alive():
            self._thread.start()

    def watch(self, waited: Waited) -> None:
        """Nothing is kept before `start`: who launches earlier waits himself."""
        if self._wake is not None:
            self._given.put(waited)

    def _run(self) -> None:
        self._begin()
        while True:
            waited = self._given.get()
            try:
                waited.synchronize()
            except RuntimeError:  # CUDA's, from torch or from _cuda
                pass
            finally:
                assert self._wake is not None
                self._wake()
