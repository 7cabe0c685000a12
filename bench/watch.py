"""A process seen from outside while a run goes on: its memory and its descriptors."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

EVERY_S = 0.5
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


class Look(NamedTuple):
    """One process at one time of the machine's monotonic clock, in seconds."""

    at_s: float
    rss_bytes: int
    num_fds: int
    cpu_s: float  # since its start


def look(pid: int) -> Look:
    """FileNotFoundError or ProcessLookupError if there is no such process."""
    proc = Path("/proc") / str(pid)
    pages = int((proc / "statm").read_text().split()[1])
    words = (proc / "stat").read_text().rpartition(")")[2].split()
    cpu_s = (int(words[11]) + int(words[12])) / _TICKS
    return Look(time.perf_counter(), pages * _PAGE_BYTES, len(os.listdir(proc / "fd")), cpu_s)


@contextlib.asynccontextmanager
async def watched(pid: int) -> AsyncIterator[list[Look]]:
    """Grows while the block runs; at least one look at the beginning and one at the end."""
    looks = [look(pid)]

    async def go_on() -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            looks.append(look(pid))

    task = asyncio.create_task(go_on())
    try:
        yield looks
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    looks.append(look(pid))
