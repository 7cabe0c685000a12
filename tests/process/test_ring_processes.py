"""Rings and doorbells between two processes: pressure, sleep, and death at any moment.

A lost wake-up would be a hang; the time limit on every wait turns it into a failure.
"""

import asyncio
import contextlib
import json
import random
import secrets
import select
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import pytest

from nodeserve.wire.channel import SHM, CoordinatorEnd, sweep_stale
from tests.fakes.ring_worker import HELLO, STOP, make_record, number_of
from tests.patience import PATIENCE_S


@dataclass(frozen=True)
class Worker:
    end: CoordinatorEnd
    process: subprocess.Popen[bytes]
    node_id: str

    def receive(self) -> list[bytes]:
        """Sleep until the worker rings, then take what is there; it may have rung for room only."""
        readable, _, _ = select.select([self.end], [], [], PATIENCE_S)
        assert readable, "a wake-up was lost"
        return self.end.receive()

    def receive_until(self, num_records: int) -> list[bytes]:
        records: list[bytes] = []
        while len(records) < num_records:
            records += self.receive()
        return records

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def left_behind(self) -> list[bytes]:
        """What a dead worker had published."""
        records: list[bytes] = []
        while more := self.end.receive():
            records += more
        return records


@contextlib.contextmanager
def started(mode: str, ring_bytes: int, seed: int = 0) -> Iterator[Worker]:
    node_id = secrets.token_hex(4)
    with CoordinatorEnd(node_id, "w0", ring_bytes) as end:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.ring_worker"]
            + [json.dumps(asdict(end.spec)), mode, str(seed)],
            pass_fds=end.inherited_fds,
        )
        worker = Worker(end, process, node_id)
        try:
            yield worker
        finally:
            worker.kill()


def say_hello(worker: Worker) -> list[bytes]:
    """Wait for the first record; returns those that came with it."""
    first, *others = worker.receive_until(1)
    assert first == HELLO
    worker.end.unlink_names()
    return others


def names(node_id: str) -> list[str]:
    return [path.name for path in SHM.iterdir() if node_id in path.name]


def test_names_are_gone_once_the_worker_has_mapped() -> None:
    with started("echo", ring_bytes=1024) as worker:
        assert len(names(worker.node_id)) == 1
        say_hello(worker)
        assert names(worker.node_id) == []
        worker.end.inbox.post(b"still there?")
        assert worker.receive_until(1) == [b"still there?"]
        worker.end.inbox.post(STOP)
        assert worker.process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize(("ring_bytes", "seed"), [(256, 1), (4096, 2), (65_536, 3)])
def test_full_rings_both_ways_lose_and_swap_nothing(ring_bytes: int, seed: int) -> None:
    rng, num_records, num_received = random.Random(seed), 10_000, 0
    with started("echo", ring_bytes) as worker:
        say_hello(worker)
        for number in range(num_records):
            worker.end.inbox.post(make_record(rng, number, max_bytes=200))
        while num_received < num_records:
            for record in worker.receive():
                assert number_of(record) == num_received
                num_received += 1
        assert worker.end.inbox.num_queued == 0
        worker.end.inbox.post(STOP)
        assert worker.process.wait(PATIENCE_S) == 0
        assert worker.left_behind() == []


@pytest.mark.parametrize("mode", ["echo", "impatient-echo"])
def test_no_wake_up_is_lost_when_both_sides_sleep_all_the_time(mode: str) -> None:
    rng, number = random.Random(4), 0
    with started(mode, ring_bytes=256) as worker:
        say_hello(worker)
        for _ in range(4000):
            burst = [make_record(rng, number + n, max_bytes=60) for n in range(rng.randint(1, 6))]
            for record in burst:
                worker.end.inbox.post(record)
            assert worker.receive_until(len(burst)) == burst
            number += len(burst)
        assert worker.end.outbox.beats > 0


async def test_an_event_loop_is_woken_through_the_descriptor() -> None:
    loop, rung = asyncio.get_running_loop(), asyncio.Event()
    with started("echo", ring_bytes=1024) as worker:
        loop.add_reader(worker.end.fileno(), rung.set)
        received: list[bytes] = []
        sent = [HELLO, *(bytes([n]) for n in range(200))]
        async with asyncio.timeout(PATIENCE_S):
            for record in sent[1:]:
                await rung.wait()
                rung.clear()
                received += worker.end.receive()
                worker.end.inbox.post(record)
            while len(received) < len(sent):
                await rung.wait()
                rung.clear()
                received += worker.end.receive()
        loop.remove_reader(worker.end.fileno())
        assert received == sent


@pytest.mark.parametrize("seed", range(16))
def test_a_producer_killed_at_any_moment_leaves_whole_records(seed: int) -> None:
    rng = random.Random(seed)
    with started("produce", rng.choice([1024, 5000, 65_536]), seed) as worker:
        records = say_hello(worker)
        enough = rng.randint(0, 3000)
        while len(records) < enough:
            records += worker.receive()
        worker.kill()
        records += worker.left_behind()
        assert [number_of(record) for record in records] == list(range(len(records)))
        expected = random.Random(str(seed))
        assert all(record == make_record(expected, n, 700) for n, record in enumerate(records))


@pytest.mark.parametrize("num_before", [0, 1, 50, 777])
def test_a_coordinator_survives_a_worker_killed_while_it_reads(num_before: int) -> None:
    rng = random.Random(num_before)
    with started("echo", ring_bytes=1024) as worker:
        records = say_hello(worker)
        for number in range(1000):
            worker.end.inbox.post(make_record(rng, number, max_bytes=100))
        while len(records) < num_before:
            records += worker.receive()
        worker.kill()
        records += worker.left_behind()
        for number in range(1000, 2000):
            worker.end.inbox.post(make_record(rng, number, max_bytes=100))
        assert worker.end.inbox.num_queued >= 1000
        assert not worker.end.inbox.flush()
        assert [number_of(record) for record in records] == list(range(len(records)))


KILLED_WHILE_STARTING = """
import os, signal
from nodeserve.wire import channel
end = channel.CoordinatorEnd("{node_id}", "w0")
channel.posix_ipc.SharedMemory(f"/nodeserve-{{os.getpid()}}-{node_id}-w1-inbox", 66, size=64)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_coordinator_killed_while_starting_is_swept_up_after() -> None:
    node_id = secrets.token_hex(4)
    code = KILLED_WHILE_STARTING.format(node_id=node_id)
    assert subprocess.run([sys.executable, "-c", code]).returncode < 0
    with CoordinatorEnd(node_id, "alive") as end:
        assert len(names(node_id)) == 3
        sweep_stale()
        assert [f"/{name.removeprefix('sem.')}" for name in names(node_id)] == [end.spec.semaphore]
