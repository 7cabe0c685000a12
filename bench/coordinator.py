"""How many tokens one coordinator core streams, and what a token costs it.

    python -m bench.coordinator [--smoke]

The coordinator, with its real rings, socket and policy, runs on one core; a worker that only sends
pre-made records and the clients share the other. Its rate therefore has two readings: tokens over
wall time (what this machine streamed, clients and worker included) and tokens over the
coordinator's own CPU time (what one core of it can stream once the others keep up).

A record costs far more than a token in it, and how many it carries is not set here: the worker runs
as far ahead as its ring lets it, with the requests that the coordinator has sent it by then. So two
runs compare by both figures, CPU a token and tokens a record.
"""

import argparse
import asyncio
import contextlib
import functools
import multiprocessing
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import uvloop

from bench.report import commit, emit
from nodeserve.checkpoint import Checkpoint
from nodeserve.config import EngineConfig, ModelConfig
from nodeserve.coordinator.placement import resolve
from nodeserve.coordinator.server import Server
from nodeserve.gpus import Gpus
from nodeserve.types import StartEvent
from nodeserve.wire.frames import FrameReader, frame
from nodeserve.wire.messages import (
    TO_CLIENT,
    TO_SERVER,
    End,
    GetStats,
    Hello,
    Stats,
    Stop,
    Submit,
    Tokens,
    pack_ids,
)

START_STOP_S = 20.0
AIM_TOKENS_PER_S = 200_000
MODEL = ModelConfig("llama", 1000, 64, 128, 1, 4, 4, 16, 8192, 1e-5, 1e4)
BLAST = (sys.executable, "-m", "bench.blast_worker")


@dataclass(frozen=True, slots=True)
class Load:
    """`requests` after each other on each of `connections`, `max_tokens` long."""

    connections: int
    requests: int
    max_tokens: int


class Client(asyncio.Protocol):
    """Counts what arrives; sends its next request when one has ended."""

    def __init__(self, load: Load, loop: asyncio.AbstractEventLoop) -> None:
        self.load = load
        self.greeted: asyncio.Future[None] = loop.create_future()
        self.done: asyncio.Future[int] = loop.create_future()
        self.tokens = 0
        self.frames = 0
        self.sent = 0
        self.reader = FrameReader(1 << 24)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)

    def submit(self) -> None:
        sampling = {"max_tokens": self.load.max_tokens, "temperature": 0.0}
        message = Submit(self.sent, pack_ids([1, 2, 3]), sampling, None, 0)
        self.sent += 1
        self.transport.write(frame(TO_SERVER.encode(message)))

    def data_received(self, data: bytes) -> None:
        for payload in self.reader.feed(data):
            self.frames += 1
            message = TO_CLIENT.decode(payload)
            if type(message) is Tokens:
                self.tokens += sum(len(item[1]) // 4 for item in message.items)
            elif type(message) is End:
                if message.code is not None:
                    self.done.set_exception(RuntimeError(message.message))
                elif self.sent == self.load.requests:
                    self.done.set_result(self.tokens)
                    self.transport.close()
                else:
                    self.submit()
            elif type(message) is Hello:
                self.greeted.set_result(None)


async def drive(path: str, load: Load) -> dict[str, float]:
    """Run a load from this process; wall time from the first request to the last End.

    All connections are open by then. The server's loop accepts one a turn, and a turn may take in a
    thousand records: of clients that begin at once the first would be gone before the last came.
    """
    loop = asyncio.get_running_loop()
    make = functools.partial(Client, load, loop)
    clients = [(await loop.create_unix_connection(make, path))[1] for _ in range(load.connections)]
    await asyncio.gather(*(client.greeted for client in clients))
    began = time.perf_counter()
    for client in clients:
        client.submit()
    tokens = sum(await asyncio.gather(*(client.done for client in clients)))
    wall_s = time.perf_counter() - began
    expected = load.connections * load.requests * load.max_tokens
    if tokens != expected:
        raise RuntimeError(f"{tokens} tokens arrived of {expected}")
    return {"tokens": tokens, "wall_s": wall_s, "frames": sum(c.frames for c in clients)}


async def stop_server(path: str) -> int:
    """Ask, and read to the end: a peer that hangs up before the Hello is not listened to.

    Returns how many records of steps the coordinator took in.
    """
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(frame(TO_SERVER.encode(GetStats())) + frame(TO_SERVER.encode(Stop(False))))
    answers = map(TO_CLIENT.decode, FrameReader(1 << 24).feed(await reader.read()))
    writer.close()
    (stats,) = (answer.stats for answer in answers if type(answer) is Stats)
    return int(stats["workers"][0]["steps"])


def node_main(path: str, connections: int, pipe: Any, cores: tuple[int, int]) -> None:
    """The coordinator's process: serve until stopped, then report its own CPU seconds.

    The worker inherits `cores[0]`, which the clients use too; the coordinator runs on `cores[1]`.
    """
    os.sched_setaffinity(0, {cores[0]})
    config = EngineConfig(
        layout="1m",
        socket=path,
        max_num_seqs=connections,
        max_num_batched_tokens=8192,
        kv_memory=1 << 26,
        max_model_len=4096,
    )
    checkpoint = Checkpoint(Path("none"), "none", MODEL, "none")
    plan = resolve(config, checkpoint, Gpus(obstacle="the workers are pretended"))
    os.sched_setaffinity(0, {cores[1]})
    spent: list[float] = []

    def on_event(event: StartEvent) -> None:
        if event.phase == "ready":
            spent.append(cpu_s())
            pipe.send("ready")

    async def run() -> int:
        return await Server(plan, checkpoint, on_event, BLAST).run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
    pipe.send(cpu_s() - spent[0])


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@contextlib.contextmanager
def node(path: str, connections: int) -> Iterator[Any]:
    """A running node; yields the pipe on which it reports its CPU seconds after a stop."""
    cores = sorted(os.sched_getaffinity(0))
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=node_main, args=(path, connections, theirs, (cores[0], cores[-1]))
    )
    process.start()
    try:
        if not ours.poll(START_STOP_S) or ours.recv() != "ready":
            raise RuntimeError("the coordinator did not start")
        os.sched_setaffinity(0, {cores[0]})
        yield ours
    finally:
        os.sched_setaffinity(0, cores)
        process.join(START_STOP_S)
        if process.is_alive():
            process.terminate()


def measure(load: Load, folder: str) -> dict[str, float]:
    """One load against one fresh node."""
    path = f"{folder}/bench-{load.connections}-{load.max_tokens}.sock"
    with node(path, load.connections) as pipe:
        try:
            result = uvloop.run(drive(path, load))
        finally:
            records = uvloop.run(stop_server(path))
        if not pipe.poll(START_STOP_S):
            raise RuntimeError("the coordinator did not stop")
        coordinator_s = pipe.recv()
    requests = load.connections * load.requests
    return {
        "connections": load.connections,
        "requests": requests,
        "max_tokens": load.max_tokens,
        "tokens_per_s": result["tokens"] / result["wall_s"],
        "requests_per_s": requests / result["wall_s"],
        "frames": result["frames"],
        "tokens_per_record": result["tokens"] / records,
        "cpu_us_per_record": 1e6 * coordinator_s / records,
        "wall_s": result["wall_s"],
        "coordinator_cpu_s": coordinator_s,
        "cpu_us_per_token": 1e6 * coordinator_s / result["tokens"],
        "tokens_per_cpu_s": result["tokens"] / coordinator_s,
        "coordinator_busy": coordinator_s / result["wall_s"],
    }


def frames_ceiling(seconds: float) -> float:
    """Frames of one token each that one core packs and writes to a socket somebody drains."""
    import socket

    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    stopped = threading.Event()

    def drain() -> None:
        while right.recv(1 << 16):
            pass
        stopped.set()

    reader = threading.Thread(target=drain)
    reader.start()
    began, count = time.perf_counter(), 0
    item = [[1, pack_ids([7]), None]]
    while time.perf_counter() - began < seconds:
        for _ in range(100):
            left.send(frame(TO_CLIENT.encode(Tokens(item))))
        count += 100
    elapsed = time.perf_counter() - began
    left.close()
    reader.join()
    right.close()
    return count / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny run: does it work?")
    smoke = parser.parse_args().smoke
    ceiling = frames_ceiling(0.1 if smoke else 1.0)
    print(f"ceiling: {ceiling:,.0f} frames/s packed and written one by one in this process")
    print(f"aim:     {AIM_TOKENS_PER_S:,} tokens/s\n")
    loads = [Load(4, 2, 50)] if smoke else [Load(64, 20, 1000), Load(512, 4, 1000)]
    short = [] if smoke else [Load(64, 200, 4)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for load in loads + short:
            rows.append(row := measure(load, folder))
            print(
                f"{load.connections:4d} connections x {load.requests} requests x"
                f" {load.max_tokens} tokens: {row['tokens_per_s']:10,.0f} tokens/s"
                f" {row['requests_per_s']:8,.0f} requests/s; coordinator"
                f" {row['cpu_us_per_token']:.2f} us/token, {row['tokens_per_cpu_s']:,.0f} tokens"
                f" per CPU second, busy {100 * row['coordinator_busy']:.0f} %;"
                f" {row['tokens_per_record']:.1f} tokens a record"
            )
    emit(
        {
            "bench": "coordinator",
            "commit": commit(),
            "aim_tokens_per_s": AIM_TOKENS_PER_S,
            "ceiling_frames_per_s": ceiling,
            "rows": rows,
        }
    )


if __name__ == "__main__":
    main()
