"""What one gateway process sustains and adds: python -m bench.gateway [--smoke]

Real gateway, real coordinator, simulated workers whose passes take a fixed time. The gateway has a
core for itself, everything else shares the other. Three readings:

- streams: 4 workers, a token for each stream every 25 ms; tokens/s, the gateway's CPU time a token,
  and what it adds to a token's way, from the socket to the HTTP client (bench/gateway/tap.py);
- flat out: the same with passes of 5 ms, more than it can follow: tokens that wait are joined;
- requests: one-token completions one after the other on 64 connections.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvloop

from bench.gateway.load import RequestClient, StreamClient
from bench.gateway.tap import Tap
from bench.report import emit, machine, percentile

CORES = sorted(os.sched_getaffinity(0))
FIRST_PROMPT = 100  # token ids from here on number the streams
AIM_TOKENS_PER_S = 20_000
AIM_ADDED_MS = 2.0
WARM_UP = 20  # tokens of each stream that are not measured
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


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


def cpu_s(pids: list[int]) -> float:
    ticks = 0
    for pid in pids:
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(values[11]) + int(values[12])
    return ticks / TICKS_PER_S


class Bed:
    """A running node and its gateway."""

    def __init__(self, tap: Tap, port: int, pids: list[int]) -> None:
        self.tap = tap
        self.port = port
        self.pids = pids

    async def streams(self, count: int, num_tokens: int) -> dict[str, Any]:
        """`count` at once; times are those of the tokens after the first few."""
        began_cpu_s, began_s = cpu_s(self.pids), time.perf_counter()
        loop = asyncio.get_running_loop()
        clients = [StreamClient(FIRST_PROMPT + number, num_tokens) for number in range(count)]
        for client in clients:
            await loop.create_connection(lambda client=client: client, "127.0.0.1", self.port)  # type: ignore[misc]
        await asyncio.gather(*(client.done for client in clients))
        wall_s, spent_s = time.perf_counter() - began_s, cpu_s(self.pids) - began_cpu_s
        added = self.added_s(clients)
        num_events = sum(client.num_events for client in clients)
        return {
            "streams": count,
            "tokens_per_s": count * num_tokens / wall_s,
            "events_per_s": num_events / wall_s,
            "cpu_us_per_token": 1e6 * spent_s / (count * num_tokens),
            "gateway_busy": spent_s / wall_s,
            "p50_added_ms": 1e3 * percentile(added, 0.5),
            "p99_added_ms": 1e3 * percentile(added, 0.99),
        }

    def added_s(self, clients: list[StreamClient]) -> list[float]:
        """Of each token after the first few of a stream."""
        added: list[float] = []
        for client in clients:
            pairs = zip(client.times, self.tap.times[client.number], strict=True)
            added += [read_s - passed_s for read_s, passed_s in list(pairs)[WARM_UP:]]
        return added

    async def requests(self, connections: int, each: int) -> dict[str, Any]:
        began_cpu_s, began_s = cpu_s(self.pids), time.perf_counter()
        loop = asyncio.get_running_loop()
        clients = [RequestClient(each) for _ in range(connections)]
        for client in clients:
            await loop.create_connection(lambda client=client: client, "127.0.0.1", self.port)  # type: ignore[misc]
        await asyncio.gather(*(client.done for client in clients))
        wall_s, spent_s = time.perf_counter() - began_s, cpu_s(self.pids) - began_cpu_s
        return {
            "connections": connections,
            "requests_per_s": connections * each / wall_s,
            "cpu_us_per_request": 1e6 * spent_s / (connections * each),
            "gateway_busy": spent_s / wall_s,
        }


@contextlib.asynccontextmanager
async def bed(folder: Path, profile: str) -> Any:
    """Yields a Bed whose gateway has served something already."""
    node_socket, tap_socket = folder / f"{profile}.sock", folder / f"{profile}-tap.sock"
    tap = Tap(node_socket)
    with on_core(CORES[0], "bench.gateway.node", str(node_socket), profile) as node:
        await asyncio.to_thread(first_line, node, "ready")
        listener = await tap.listen(tap_socket)
        options = ("--http", "127.0.0.1:0", "--socket", str(tap_socket))
        with on_core(CORES[-1], "nodeserve", "gateway", *options) as gateway:
            line = await asyncio.to_thread(first_line, gateway, "serving")
            port = int(line.rpartition(":")[2])
            made = Bed(tap, port, [])
            await made.streams(1, 50)
            yield Bed(tap, port, children(gateway.pid))
        listener.close()


async def measure(folder: Path, smoke: bool) -> dict[str, Any]:
    counts, num_tokens = ([4], 30) if smoke else ([1, 64, 512], 300)
    found: dict[str, Any] = {"streams": []}
    async with bed(folder, "steady") as steady:
        for count in counts:
            row = await steady.streams(count, num_tokens)
            found["streams"].append(row)
            told = f"P50 {row['p50_added_ms']:.2f} ms, P99 {row['p99_added_ms']:.2f}"
            print(f"{count:4d} streams, a token each 25 ms: {words(row)}; added {told}")
    async with bed(folder, "swift") as swift:
        row = found["flat_out"] = await swift.streams(counts[-1], num_tokens)
        print(
            f"{counts[-1]:4d} streams flat out: {words(row)}, {row['events_per_s']:,.0f} events/s"
        )
        row = found["requests"] = await swift.requests(8 if smoke else 64, 5 if smoke else 100)
        print(
            f"{row['connections']:4d} connections: {row['requests_per_s']:,.0f} requests/s,"
            f" {row['cpu_us_per_request']:.0f} us of CPU each, busy {row['gateway_busy']:.0%}"
        )
    return found


def words(row: dict[str, Any]) -> str:
    return (
        f"{row['tokens_per_s']:9,.0f} tokens/s, {row['cpu_us_per_token']:.1f} us of CPU each,"
        f" gateway busy {row['gateway_busy']:.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny run: does it work?")
    smoke = parser.parse_args().smoke
    print(
        f"aims: {AIM_TOKENS_PER_S:,} tokens/s of one process; P50 added under {AIM_ADDED_MS:g} ms\n"
    )
    where = machine()  # before this process keeps to one core
    with tempfile.TemporaryDirectory(prefix="nodeserve-") as folder:
        found = uvloop.run(measure(Path(folder), smoke))
    aims = {"aim_tokens_per_s": AIM_TOKENS_PER_S, "aim_p50_added_ms": AIM_ADDED_MS}
    emit({"bench": "gateway", "machine": where, **aims, **found})


if __name__ == "__main__":
    main()
