"""Rings and doorbells between two processes: one-way latency, records/s, GB/s.

    python -m bench.ring [--smoke]

Latency is one-way: the sender stamps the record with the machine-wide monotonic clock, the receiver
reads the clock once the record is in its hands. *Hot* is a receiver that polls, *woken* one that
sleeps: the worker on its semaphore, the coordinator in its event loop. The ceilings are the same
two processes on the same two cores without a ring: a word in shared memory, a bare semaphore, a
bare eventfd, copies through shared slots. In many virtual machines a core that sleeps takes long to
wake, and no doorbell can be faster; *core awake* repeats the measurement with a process of the
lowest class turning on the receiver's core, which leaves only what the software costs.
"""

import argparse
import asyncio
import mmap
import os
import secrets
import select
import signal
import statistics
import struct
from dataclasses import asdict, dataclass

import posix_ipc
import uvloop

from bench.processes import CORES, LIMIT_S, Samples, awake, now_ns, paced, together
from bench.report import emit, percentile
from nodeserve._host import RING_HEADER_BYTES, Ring
from nodeserve.wire.channel import CoordinatorEnd, WorkerEnd

STAMP = struct.Struct("<q24x")  # 32 bytes


@dataclass(frozen=True, slots=True)
class Config:
    num_hot: int = 20_000
    num_woken: int = 3_000
    hot_gap_us: int = 10
    woken_gap_us: int = 200  # long enough that the receiver sleeps
    num_small: int = 500_000
    batch: int = 64
    small_bytes: int = 32
    large_bytes: tuple[int, ...] = (64 << 10, 512 << 10)
    large_total_bytes: int = 1 << 30
    ring_bytes: int = 2 << 20
    repeats: int = 5


SMOKE = Config(
    num_hot=200,
    num_woken=50,
    num_small=2_000,
    large_bytes=(64 << 10,),
    large_total_bytes=8 << 20,
    repeats=1,
)


def shared_ring(config: Config) -> Ring:
    return Ring(mmap.mmap(-1, RING_HEADER_BYTES + config.ring_bytes), create=True)


# ---- without a ring


def raw_word(config: Config) -> Samples:
    """A stamp in shared memory, read by a process that polls: the floor of "hot".

    The next is sent only when the last was taken: a watcher that is off its core misses none.
    """
    word = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")

    def send() -> Samples:
        stamp = 0
        for _ in paced(config.num_hot, config.hot_gap_us):
            while word[1] != stamp:
                pass
            word[0] = stamp = now_ns()
        return []

    def watch() -> Samples:
        samples: Samples = []
        seen = 0
        while len(samples) < config.num_hot:
            if (stamp := word[0]) != seen:
                samples.append(now_ns() - stamp)
                word[1] = seen = stamp
        return samples

    return together(send, watch)[1]


def raw_semaphore(config: Config) -> Samples:
    """A bare semaphore: the floor of "woken" towards a worker."""
    word = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")
    name = f"/nodeserve-{os.getpid()}-{secrets.token_hex(4)}-bench"
    semaphore = posix_ipc.Semaphore(name, posix_ipc.O_CREX)
    semaphore.unlink()

    def send() -> Samples:
        for _ in paced(config.num_woken, config.woken_gap_us):
            word[0] = now_ns()
            semaphore.release()
        return []

    def sleep() -> Samples:
        samples = []
        for _ in range(config.num_woken):
            semaphore.acquire()
            samples.append(now_ns() - word[0])
        return samples

    samples = together(send, sleep)[1]
    semaphore.close()
    return samples


def raw_eventfd(config: Config) -> Samples:
    """A bare eventfd and epoll: the floor of "woken" towards the coordinator."""
    word = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")
    fd = os.eventfd(0)

    def send() -> Samples:
        for _ in paced(config.num_woken, config.woken_gap_us):
            word[0] = now_ns()
            os.eventfd_write(fd, 1)
        return []

    def sleep() -> Samples:
        samples, num_rung = [], 0
        with select.epoll() as poll:
            poll.register(fd, select.EPOLLIN)
            while num_rung < config.num_woken:
                poll.poll()
                num_rung += os.eventfd_read(fd)
                samples.append(now_ns() - word[0])
        return samples

    samples = together(sleep, send)[0]
    os.close(fd)
    return samples


def raw_slots(num_bytes: int, config: Config) -> float:
    """Records per second when each is copied into one of a few shared slots and out of it in the
    other process, with a counter per side and nothing else: the floor of large records."""
    slots = max(2, config.ring_bytes // num_bytes)
    num_records = max(1, config.large_total_bytes // num_bytes)
    source = bytes(num_bytes)

    def once() -> float:
        memory = memoryview(mmap.mmap(-1, mmap.PAGESIZE + slots * num_bytes))
        written, taken = memory[:8].cast("q"), memory[1024:1032].cast("q")

        def slot(number: int) -> memoryview:
            start = mmap.PAGESIZE + number % slots * num_bytes
            return memory[start : start + num_bytes]

        def send() -> Samples:
            start_ns = now_ns()
            for number in range(num_records):
                while number - taken[0] >= slots:
                    pass
                slot(number)[:] = source
                written[0] = number + 1
            return [start_ns]

        def receive() -> Samples:
            for number in range(num_records):
                while written[0] <= number:
                    pass
                bytes(slot(number))
                taken[0] = number + 1
            return [now_ns()]

        (end_ns,), (start_ns,) = together(receive, send)
        return num_records / (end_ns - start_ns) * 1e9

    return statistics.median(once() for _ in range(config.repeats))


# ---- with a ring


def hot(config: Config) -> Samples:
    ring = shared_ring(config)

    def send() -> Samples:
        for _ in paced(config.num_hot, config.hot_gap_us):
            ring.put(STAMP.pack(now_ns()))
        return []

    def poll() -> Samples:
        samples: Samples = []
        while len(samples) < config.num_hot:
            for record in ring.drain():
                samples.append(now_ns() - STAMP.unpack(record)[0])
        return samples

    return together(send, poll)[1]


def woken_worker(config: Config) -> Samples:
    with CoordinatorEnd(secrets.token_hex(4), "bench") as coordinator:

        def send() -> Samples:
            select.select([coordinator], [], [])  # until the worker is there
            for _ in paced(config.num_woken, config.woken_gap_us):
                coordinator.inbox.post(STAMP.pack(now_ns()))
            return []

        def sleep() -> Samples:
            samples: Samples = []
            with WorkerEnd(coordinator.spec) as worker:
                worker.outbox.put(b"ready")
                while len(samples) < config.num_woken:
                    worker.inbox.wait(None)
                    for record in worker.inbox.drain():
                        samples.append(now_ns() - STAMP.unpack(record)[0])
            return samples

        return together(send, sleep)[1]


def woken_coordinator(config: Config) -> Samples:
    with CoordinatorEnd(secrets.token_hex(4), "bench") as coordinator:

        def send() -> Samples:
            with WorkerEnd(coordinator.spec) as worker:
                for _ in paced(config.num_woken, config.woken_gap_us):
                    worker.outbox.put(STAMP.pack(now_ns()))
            return []

        async def listen() -> Samples:
            loop, samples = asyncio.get_running_loop(), []
            done = asyncio.Event()

            def receive() -> None:
                for record in coordinator.receive():
                    samples.append(now_ns() - STAMP.unpack(record)[0])
                if len(samples) == config.num_woken:
                    done.set()

            loop.add_reader(coordinator.fileno(), receive)
            await done.wait()
            loop.remove_reader(coordinator.fileno())
            return samples

        return together(lambda: uvloop.run(listen()), send)[0]


def records_per_s(config: Config, record_bytes: int, num_records: int, batch: int) -> float:
    """From the first put in one process to the last drain in the other; both poll. Large records
    are taken one by one, as a process would that handles each before the next."""
    records = [bytes(record_bytes)] * batch
    max_taken = max(1, (64 << 10) // record_bytes)

    def once() -> float:
        ring = shared_ring(config)

        def send() -> Samples:
            start_ns, num_sent = now_ns(), 0
            put, put_many, record = ring.put, ring.put_many, records[0]
            while num_sent < num_records:
                num_sent += put(record) if batch == 1 else put_many(records)
            return [start_ns, num_sent]

        def receive() -> Samples:
            num_received = 0
            while num_received < num_records:
                num_received += len(ring.drain(max_taken))
            return [now_ns()]

        (end_ns,), (start_ns, _) = together(receive, send)
        return num_records / (end_ns - start_ns) * 1e9

    return statistics.median(once() for _ in range(config.repeats))


# ---- the report


def latency(name: str, samples: Samples) -> dict[str, object]:
    samples = samples[len(samples) // 10 :]  # what came before both were warm
    summary = {
        "p50_us": round(percentile(samples, 0.50) / 1e3, 2),
        "p99_us": round(percentile(samples, 0.99) / 1e3, 2),
        "num_samples": len(samples),
    }
    print(
        f"  {name:<34} p50 {summary['p50_us']:8.2f} us   p99 {summary['p99_us']:8.2f} us",
        flush=True,
    )
    return {name: summary}


def rate(name: str, per_s: float, record_bytes: int) -> dict[str, object]:
    gb_s = per_s * record_bytes / 1e9
    print(f"  {name:<34} {per_s / 1e6:8.3f} M records/s {gb_s:8.2f} GB/s", flush=True)
    return {name: {"records_per_s": round(per_s), "gb_s": round(gb_s, 3)}}


def measure_ceilings(config: Config) -> dict[str, object]:
    print("ceilings, without a ring")
    found = latency("polled word", raw_word(config))
    found |= latency("semaphore", raw_semaphore(config))
    found |= latency("eventfd", raw_eventfd(config))
    with awake(CORES[-1]):
        found |= latency("semaphore, core awake", raw_semaphore(config))
    with awake(CORES[0]):
        found |= latency("eventfd, core awake", raw_eventfd(config))
    for num_bytes in config.large_bytes:
        found |= rate(f"slots of {num_bytes >> 10} KiB", raw_slots(num_bytes, config), num_bytes)
    return found


def measure_rings(config: Config) -> dict[str, object]:
    print("rings, one way")
    found = latency("hot", hot(config))
    found |= latency("woken worker", woken_worker(config))
    found |= latency("woken coordinator", woken_coordinator(config))
    with awake(CORES[-1]):
        found |= latency("woken worker, core awake", woken_worker(config))
    with awake(CORES[0]):
        found |= latency("woken coordinator, core awake", woken_coordinator(config))
    size, num = config.small_bytes, config.num_small
    for batch in (1, config.batch):
        per_s = records_per_s(config, size, num, batch)
        found |= rate(f"{size} B, {batch} per put", per_s, size)
    for size in config.large_bytes:
        num = config.large_total_bytes // size
        found |= rate(f"{size >> 10} KiB", records_per_s(config, size, num, 1), size)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency and throughput of the rings.")
    parser.add_argument("--smoke", action="store_true", help="only show that it runs")
    config = SMOKE if parser.parse_args().smoke else Config()
    signal.alarm(LIMIT_S)
    if len(CORES) == 1:
        print("one core only: polling processes take turns, nothing here is meaningful")
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"other processes are busy (load {load:.1f}): expect waits of whole time slices")
    ceilings = measure_ceilings(config)
    rings = measure_rings(config)
    machine = {"num_cores": len(CORES), "load_before": load}
    facts = {"bench": "ring", "config": asdict(config), "machine": machine}
    emit(facts | {"ceilings": ceilings, "rings": rings})


if __name__ == "__main__":
    main()
