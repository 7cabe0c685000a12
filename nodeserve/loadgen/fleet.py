"""Client processes, side by side: each takes every n-th request of a schedule.

They share one clock, and each start lies far enough ahead for all to be ready. The caller's own
process only listens, so that what it shows does not disturb what is measured.
"""

import asyncio
import contextlib
import math
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from nodeserve.errors import ConfigError, ConnectionLost, from_code
from nodeserve.loadgen.process import (
    Ended,
    Failed,
    GiveUp,
    Go,
    Prepare,
    Ready,
    packed,
    read_message,
)
from nodeserve.loadgen.records import Job, Sample
from nodeserve.loadgen.targets import About, TargetOptions
from nodeserve.plan.records import Arrival

COMMAND = (sys.executable, "-m", "nodeserve.loadgen")
LEAD_S = 0.05  # from saying when a run begins to its beginning
MAX_PROCESSES = 64
DRAIN_S = 120.0


class Seen(NamedTuple):
    """What the clients saw of a run: all its requests, in any order, and how late they woke up."""

    samples: list[Sample]
    lags_s: list[float]


class Watcher:
    """Is told of a run while it goes on. `give_up` is asked after each news."""

    def began(self, num_requests: int, began_s: float) -> None: ...

    def ended(self, samples: Sequence[Sample]) -> None: ...

    def give_up(self) -> bool:
        return False


class Fleet:
    """`async with Fleet(options, num_processes) as fleet`, then one run after the other."""

    def __init__(self, options: TargetOptions, num_processes: int = 1) -> None:
        if not 1 <= num_processes <= MAX_PROCESSES:
            raise ConfigError(f"--processes {num_processes}: use 1 to {MAX_PROCESSES}")
        self._options = options
        self._num = num_processes
        self._processes: list[asyncio.subprocess.Process] = []
        self._run = time.time_ns() // 1000  # other prompts than any run before
        self.about: About

    async def __aenter__(self) -> "Fleet":
        try:
            for _ in range(self._num):
                self._processes.append(
                    await asyncio.create_subprocess_exec(
                        *COMMAND, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
                    )
                )
            self._send_all(self._options)
            self.about = (await asyncio.gather(*map(self._answer, self._processes)))[0]
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the processes; what still runs is left."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        for process in self._processes:
            await process.wait()
        self._processes.clear()

    async def run(
        self,
        arrivals: Sequence[Arrival],
        *,
        concurrency: int | None = None,
        drain_s: float = DRAIN_S,
        watcher: Watcher | None = None,
    ) -> Seen:
        """Send the requests on their schedule, or with `concurrency` at once in order, and wait for
        their ends; open loop: `drain_s` seconds after the last was sent, else each as long.
        """
        jobs = [Job(number, arrival) for number, arrival in enumerate(arrivals)]
        self._run += 1
        processes = self._processes[: concurrency or None]
        shares = [jobs[place :: len(processes)] for place in range(len(processes))]
        for process, share in zip(processes, shares, strict=True):
            self._send(process, Prepare(share, self._run))
        for answer in await asyncio.gather(*map(self._answer, processes)):
            assert isinstance(answer, Ready)
        began_s = time.perf_counter() + LEAD_S
        for place, process in enumerate(processes):
            many = None
            if concurrency is not None:
                many = math.ceil((concurrency - place) / len(processes))
            self._send(process, Go(began_s, drain_s, many))
        watcher = watcher or Watcher()
        watcher.began(len(jobs), began_s)
        return await self._listen(processes, watcher)

    async def _listen(
        self, processes: Sequence[asyncio.subprocess.Process], watcher: Watcher
    ) -> Seen:
        seen = Seen([], [])
        given_up = False

        async def one(process: asyncio.subprocess.Process) -> None:
            nonlocal given_up
            while True:
                news = await self._answer(process)
                assert isinstance(news, Ended)
                seen.samples.extend(news.samples)
                seen.lags_s.extend(news.lags_s)
                watcher.ended(news.samples)
                if not given_up and watcher.give_up():
                    given_up = True
                    for other in processes:
                        self._send(other, GiveUp())
                if news.over:
                    return

        await asyncio.gather(*map(one, processes))
        return seen

    def _send_all(self, message: object) -> None:
        for process in self._processes:
            self._send(process, message)

    def _send(self, process: asyncio.subprocess.Process, message: object) -> None:
        assert process.stdin is not None
        process.stdin.write(packed(message))

    async def _answer(self, process: asyncio.subprocess.Process) -> Any:
        """The next message of a process; raises what it failed with."""
        assert process.stdout is not None
        message = await read_message(process.stdout)
        if message is None:
            raise ConnectionLost("a client process ended: what it wrote on stderr says why")
        if isinstance(message, Failed):
            if message.code == "internal":
                raise RuntimeError(f"a client process failed:\n{message.message}")
            raise from_code(message.code, message.message)
        return message
