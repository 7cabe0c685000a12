"""The way down: finish what runs, end what is left, say goodbye; and the exit code that gives.

Each rung is bounded: requests by the drain's timeout, clients that do not read by FLUSH_S or what
is left of it, workers by the supervisor's ladder. During a drain connections are still taken, so
that people can look and hurry it; new requests are refused with the time to come back.

SIGTERM and a closed terminal drain, and again is no hurry (some tools send it twice). SIGINT drains
as well; during a drain it ends the rest at once, and workers are killed instead of asked.
"""

import asyncio
import signal
import time
from collections.abc import Callable
from functools import partial

from nodeserve.coordinator.coordinator import Coordinator
from nodeserve.errors import NodeServeError, ShuttingDown

FLUSH_S = 1.0  # for clients to read their last frames, where no drain has more time left
STOPPED, FAILED, CUT_OFF = 0, 1, 3  # exit codes


class Ending:
    """Why and how a node's run ends. `begin` may be called from anywhere in the loop's thread."""

    def __init__(self, drain_timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.error: NodeServeError | None = None  # why, unless it was asked for
        self.failed = False  # it served to the end, but not with all that it had
        self.begun = asyncio.Event()
        self.hurried = asyncio.Event()  # wait for nothing any more
        self.deadline_s = 0.0  # of the drain
        self._drain_timeout_s = drain_timeout_s
        self._clock = clock
        self._drains = False
        self._wound_down = asyncio.Event()  # a drain need not wait any longer
        self._all_left = asyncio.Event()
        self._cut_off = False

    @property
    def code(self) -> int:
        """0: as it was told. 1: it failed. 3: a drain ended before all requests had."""
        if self.error is not None or self.failed:
            return FAILED
        return CUT_OFF if self._cut_off else STOPPED

    @property
    def reason(self) -> NodeServeError:
        """What requests and connections that it ends are told."""
        return self.error or ShuttingDown("the server was stopped")

    def listen(self, stop: Callable[[bool], None]) -> None:
        """Take signals from now on: `stop(drain)` begins the end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup
            loop.add_signal_handler(number, partial(self._on_signal, number, stop))

    def _on_signal(self, number: signal.Signals, stop: Callable[[bool], None]) -> None:
        if number == signal.SIGINT and self.begun.is_set():
            self.hurried.set()
            stop(False)
        else:
            stop(True)

    def begin(self, *, drain: bool, error: NodeServeError | None = None) -> None:
        """A later call without `drain` cuts a drain short."""
        self.error = self.error or error
        if not self.begun.is_set():
            self._drains = drain
            self.deadline_s = self._clock() + (self._drain_timeout_s if drain else 0.0)
            self.begun.set()
        elif not drain:
            self.deadline_s = self._clock()
            self._wound_down.set()

    async def drain(self, coordinator: Coordinator) -> None:
        """Let what was accepted finish, if there is time for that; then end it."""
        if self._drains and not coordinator.is_idle:
            coordinator.on_idle = self._wound_down.set
            await within(self.deadline_s - self._clock(), self._wound_down)
        if not coordinator.is_idle:
            self._cut_off = self._drains
        coordinator.end_all(self.reason)
        coordinator.flush()

    async def say_goodbye(self, coordinator: Coordinator) -> None:
        """Close every connection once its client has read all, or could have."""

        def left() -> None:
            if not coordinator.streams:
                self._all_left.set()

        coordinator.on_left = left
        coordinator.farewell = self.reason
        for stream in list(coordinator.streams):
            stream.goodbye(self.reason.code, str(self.reason))
        if coordinator.streams:
            left_s = max(FLUSH_S, self.deadline_s - self._clock())
            await within(left_s, self._all_left, self.hurried)
        for stream in list(coordinator.streams):
            self._cut_off = self._drains
            stream.abort()


async def within(timeout_s: float, *events: asyncio.Event) -> None:
    """Until one of the events is set, or the time is over."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
