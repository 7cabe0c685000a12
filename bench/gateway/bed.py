"""A running node and its gateway, and what each of them takes.

The gateway has a core for itself; node, workers, the tap between them and the HTTP clients share
the other. So the readings say whose core was full: a token costs each side some CPU time, and where
one of the two cores has no time left, that side is the limit. A client that gets no core reads
late; what it says of times is the kernel's word (bench/gateway/load.py).
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gateway.load import Address, RequestClient, StreamClient, clock_of_day
from bench.gateway.tap import Tap
from bench.report import percentile

CORES = sorted(os.sched_getaffinity(0))
FIRST_PROMPT = 100  # token ids from here on number the streams
FULL = 0.95  # of a core: nothing more goes
CPUCLOCK_SCHED = 2  # linux/posix-timers.h


@contextlib.contextmanager
def on_core(core: int, *command: str) -> Iterator["subprocess.Popen[str]"]:
    """A process of Python on one core; it has said its first line. Ended with the block."""
    os.sched_setaffinity(0, {core})
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    os.sched_setaffinity(0, {CORES[0]})
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


def first_line(process: "subprocess.Popen[str]", words: str) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if words not in line:
        raise RuntimeError(f"it did not start: {line}{process.communicate()[0]}")
    return line


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(one) for task in tasks for one in (task / "children").read_text().split()]


def cpu_s(pids: Sequence[int]) -> float:
    """Of all their threads, by the clocks that the kernel keeps of processes."""
    return sum(time.clock_gettime(~pid << 3 | CPUCLOCK_SCHED) for pid in pids)


@dataclass(frozen=True, slots=True)
class Spent:
    """CPU seconds by who spent them, and the clock's."""

    gateway_s: float
    node_s: float
    client_s: float  # clients and the tap: this process
    wall_s: float

    def since(self, before: "Spent") -> "Spent":
        return Spent(
            self.gateway_s - before.gateway_s,
            self.node_s - before.node_s,
            self.client_s - before.client_s,
            self.wall_s - before.wall_s,
        )

    def per(self, count: int, what: str) -> dict[str, Any]:
        """Microseconds for each of so many, how full the cores were, and what was the limit."""
        gateway, other = self.gateway_s / self.wall_s, (self.node_s + self.client_s) / self.wall_s
        limit = "the gateway's core" if gateway > FULL else "the load's core"
        return {
            f"gateway_us_per_{what}": 1e6 * self.gateway_s / count,
            f"node_us_per_{what}": 1e6 * self.node_s / count,
            f"client_us_per_{what}": 1e6 * self.client_s / count,
            "gateway_busy": gateway,
            "load_busy": other,
            "limit": limit if max(gateway, other) > FULL else "the pace",
            f"full_core_{what}s_per_s": count / self.gateway_s,
        }


class Bed:
    """Where a gateway answers, and by whom."""

    def __init__(self, tap: Tap, address: Address, gateways: list[int], node: list[int]) -> None:
        self.tap = tap
        self.address = address
        self.gateways = gateways
        self.node = node

    def spent(self) -> Spent:
        here_s = time.process_time()
        return Spent(cpu_s(self.gateways), cpu_s(self.node), here_s, time.perf_counter())

    async def streams(self, count: int, num_tokens: int) -> dict[str, Any]:
        """`count` at once: what they have and cost from when all run until the first ends."""
        day_s = clock_of_day()
        clients = [StreamClient(FIRST_PROMPT + number, num_tokens) for number in range(count)]
        for client in clients:
            await client.start(self.address, day_s)
        await asyncio.gather(*(client.warm for client in clients))
        before = self.spent()
        await asyncio.wait([client.done for client in clients], return_when=FIRST_COMPLETED)
        spent = (after := self.spent()).since(before)
        await asyncio.gather(*(client.done for client in clients))
        num_events = sum(before.wall_s <= at_s < after.wall_s for c in clients for at_s in c.events)
        added = self.added_s(clients, before.wall_s, after.wall_s)
        if spent.wall_s <= 0 or not added:
            raise RuntimeError(f"{num_tokens} tokens are over before all {count} streams run")
        return {
            "streams": count,
            "measured_s": spent.wall_s,
            "tokens_per_s": len(added) / spent.wall_s,
            "events_per_s": num_events / spent.wall_s,
            **spent.per(len(added), "token"),
            "p50_added_ms": 1e3 * percentile(added, 0.5),
            "p90_added_ms": 1e3 * percentile(added, 0.9),
            "p99_added_ms": 1e3 * percentile(added, 0.99),
        }

    def added_s(self, clients: list[StreamClient], begin_s: float, end_s: float) -> list[float]:
        """Of each token that was read in this time."""
        return [
            read_s - passed_s
            for client in clients
            for read_s, passed_s in zip(client.times, self.tap.times[client.number], strict=True)
            if begin_s <= read_s < end_s
        ]

    async def requests(self, connections: int, each: int) -> dict[str, Any]:
        before, day_s = self.spent(), clock_of_day()
        clients = [RequestClient(each) for _ in range(connections)]
        for client in clients:
            await client.start(self.address, day_s)
        await asyncio.gather(*(client.done for client in clients))
        spent = self.spent().since(before)
        return {
            "connections": connections,
            "requests_per_s": connections * each / spent.wall_s,
            **spent.per(connections * each, "request"),
        }


@contextlib.asynccontextmanager
async def node(folder: Path, profile: str) -> AsyncIterator[tuple[Tap, Path, list[int]]]:
    """A node whose passes take a fixed time, a tap before it, and who works for it."""
    socket, tap_socket = folder / f"{profile}.sock", folder / f"{profile}-tap.sock"
    with on_core(CORES[0], "bench.gateway.node", str(socket), profile) as process:
        await asyncio.to_thread(first_line, process, "ready")
        tap = Tap(socket)
        listener = await tap.listen(tap_socket)
        yield tap, tap_socket, [process.pid, *children(process.pid)]
        listener.close()


@contextlib.asynccontextmanager
async def bed(
    behind: tuple[Tap, Path, list[int]], unix: bool = False, workers: int = 1
) -> AsyncIterator[Bed]:
    """Gateways before a node, which have served something already."""
    tap, socket, node_pids = behind
    path = socket.with_suffix(".http")
    http = f"unix:{path}" if unix else "127.0.0.1:0"
    options = ("--http", http, "--socket", str(socket), "--workers", str(workers))
    with on_core(CORES[-1], "nodeserve", "gateway", *options) as gateway:
        line = await asyncio.to_thread(first_line, gateway, "serving")
        address: Address = path if unix else int(line.rpartition(":")[2])
        made = Bed(tap, address, children(gateway.pid), node_pids)
        await made.streams(workers, 50)
        yield made
