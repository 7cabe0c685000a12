"""Sending, in one process: on schedule whether or not answers are back, or a few at a time."""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from nodeserve.errors import NodeServeError
from nodeserve.loadgen.records import GIVEN_UP, UNSENT, Job, Sample
from nodeserve.loadgen.targets import Target

TICK_S = 0.01  # of the timer that shows how late this process wakes up
TIMEOUT = "timeout"
Told = Callable[[Sample], None]


class Load(NamedTuple):
    """A job with everything that could be made before its time."""

    job: Job
    payload: bytes


class Driver:
    """Runs loads against a target, once; `on_sample` is told of each request when it has ended.
    `began_s` is the start of the run on the monotonic clock."""

    def __init__(self, target: Target, began_s: float, on_sample: Told) -> None:
        self._target = target
        self._began_s = began_s
        self._on_sample = on_sample
        self._given_up = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self.lags_s: list[float] = []  # that this process woke up late by

    def give_up(self) -> None:
        """End the run now: what runs is cut off, what was not sent is not."""
        if not self._given_up.done():
            self._given_up.set_result(None)
        for task in self._tasks:
            task.cancel()

    async def open_loop(self, loads: Sequence[Load], drain_s: float) -> None:
        """Send each load at its arrival's time; loads come by time.

        What has not ended `drain_s` seconds after the last was sent is cut off.
        """
        ticker = asyncio.create_task(self._tick())
        for load in loads:
            due_s = load.job.arrival.arrived_s
            await self._until(due_s)
            if self._given_up.done():
                self._unsent(load, due_s)
            else:
                self._tasks.add(asyncio.create_task(self._ask(load, due_s)))
        await self._finish(drain_s)
        await _stop(ticker)

    async def closed_loop(self, loads: Sequence[Load], concurrency: int, limit_s: float) -> None:
        """Keep `concurrency` requests running until all loads were sent; none for longer than
        `limit_s`."""
        ticker = asyncio.create_task(self._tick())
        await self._until(0.0)
        waiting = list(reversed(loads))

        async def one_after_another() -> None:
            while waiting:
                await self._ask(waiting.pop(), None, limit_s)

        for _ in range(0 if self._given_up.done() else concurrency):
            self._tasks.add(asyncio.create_task(one_after_another()))
        await self._finish(None)
        for load in reversed(waiting):
            self._unsent(load, None)
        await _stop(ticker)

    async def _ask(self, load: Load, due_s: float | None, limit_s: float | None = None) -> None:
        sample = Sample(load.job, due_s, self._now_s())
        try:
            async with asyncio.timeout(limit_s):
                await self._target.ask(load.job, load.payload, sample, self._began_s)
        except NodeServeError as error:
            sample.error, sample.message = error.code, str(error)
        except TimeoutError:
            sample.error = TIMEOUT
        except asyncio.CancelledError:
            sample.error = GIVEN_UP if self._given_up.done() else TIMEOUT
            raise
        finally:
            sample.ended_s = self._now_s()
            self._on_sample(sample)

    async def _finish(self, drain_s: float | None) -> None:
        if not self._tasks:
            return
        _, running = await asyncio.wait(self._tasks, timeout=drain_s)
        for task in running:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    async def _until(self, due_s: float) -> None:
        """Sleep; at least one turn of the loop, so that answers are read while sends are late."""
        delay_s = due_s - self._now_s()
        if delay_s > 0.0:
            await asyncio.wait([self._given_up], timeout=delay_s)
        else:
            await asyncio.sleep(0)

    def _unsent(self, load: Load, due_s: float | None) -> None:
        sent_s = self._now_s() if due_s is None else due_s
        self._on_sample(Sample(load.job, due_s, sent_s, ended_s=sent_s, error=UNSENT))

    async def _tick(self) -> None:
        while True:
            asked_s = self._now_s()
            try:
                await asyncio.sleep(TICK_S)
            finally:  # a freeze at the end of a run counts as well
                self.lags_s += lags_of(self._now_s() - asked_s - TICK_S)

    def _now_s(self) -> float:
        return time.perf_counter() - self._began_s


def lags_of(late_s: float) -> list[float]:
    """The lag of a wake-up, and of those that never came because of it: one a tick. Else a second
    that a client lost would be one lag among many instead of a hundred."""
    num_missed = max(0, math.ceil(late_s / TICK_S) - 1)
    return [max(0.0, late_s)] + [late_s - TICK_S * (place + 1) for place in range(num_missed)]


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
