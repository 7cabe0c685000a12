"""Pages from one worker process's pool to another's, as in a handoff: `make bench-handoff`.

Both are real workers around a model that computes nothing, with pages of the demo model's size. The
bench is the coordinator: it has a prompt prefilled and pinned on one, and pulled by the other again
and again. Sources take turns, so that together they are larger than the caches.

The ceiling is one memcpy of as many bytes, of the same sources in the same order, on the core that
the pulling worker is pinned to. `python -m bench.handoff [--smoke]`
"""

import argparse
import ctypes
import mmap
import os
import time
from collections.abc import Callable
from dataclasses import replace

from bench.report import emit, percentile
from nodeserve.config import WorkerSpec
from nodeserve.policy.blocks import blocks_for
from nodeserve.wire.messages import Dropped, KvPulled, PagesAttached, ReleaseKv
from tests.fakes.harness import WorkerProcess, default_spec, started
from tests.fakes.model import FakeSettings

BLOCK_SIZE = 16
BLOCK_BYTES = 30 * 2 * 3 * 64 * 2 * BLOCK_SIZE  # SmolLM2-135M in 16 bits: 368,640
NUM_TOKENS = (1, 16, 64, 256, 1024, 2048)
SIGNALLED_TOKENS = 256
ROTATION_BYTES = 96 << 20  # three times the last-level cache of the machine this was written on
MAX_SOURCES = 64
CORES = sorted(os.sched_getaffinity(0))


def num_sources(num_bytes: int) -> int:
    return max(2, min(MAX_SOURCES, ROTATION_BYTES // num_bytes))


def times_of(num_turns: int, num_sources: int, turn: Callable[[int], float]) -> list[float]:
    """One round over all sources touches the memory and is left out."""
    return [turn(i) for i in range(num_sources + num_turns)][num_sources:]


def memcpy_seconds(num_bytes: int, num_turns: int) -> float:
    """Median of copying `num_bytes` out of one of the sources."""
    sources = num_sources(num_bytes)
    source, target = mmap.mmap(-1, sources * num_bytes), mmap.mmap(-1, num_bytes)
    views = [(ctypes.c_char * len(memory)).from_buffer(memory) for memory in (source, target)]
    start, end = map(ctypes.addressof, views)
    ctypes.memset(start, 1, sources * num_bytes)

    def turn(i: int) -> float:
        began = time.perf_counter()
        ctypes.memmove(end, start + i % sources * num_bytes, num_bytes)
        return time.perf_counter() - began

    return percentile(times_of(num_turns, sources, turn), 0.5)


class Pair:
    """A worker that has pages and one that pulls them."""

    def __init__(self, source: WorkerProcess, target: WorkerProcess) -> None:
        self.source = source
        self.target = target
        self._next_id = 0

    def pin(self, num_tokens: int, count: int) -> list[int]:
        """Request ids of prompts that wait on the source to be pulled."""
        ids = list(range(self._next_id, self._next_id + count))
        self._next_id += count
        for request_id in ids:
            self.source.prefill(request_id, [1] * num_tokens, handoff=True, max_tokens=2)
        self.source.until(lambda: all(one in self.source.pinned for one in ids))
        return ids

    def pull(self, request_id: int, num_tokens: int) -> tuple[KvPulled, float]:
        """What the worker says of the copy, and the seconds until the coordinator knows."""
        began = time.perf_counter()
        self.target.pull(self.source, request_id, [1] * num_tokens, max_tokens=2)
        pulled = self.target.expect(KvPulled, request_id)
        seconds = time.perf_counter() - began
        self.target.finish(request_id)
        del self.target.finished[request_id]
        self.target.said.clear()
        return pulled, seconds

    def measure(self, num_tokens: int, num_turns: int) -> tuple[float, float]:
        """Medians: seconds of the copy, seconds with the signals."""
        num_bytes = blocks_for(num_tokens, BLOCK_SIZE) * BLOCK_BYTES
        ids = self.pin(num_tokens, num_sources(num_bytes))
        with_signals: list[float] = []

        def turn(i: int) -> float:
            pulled, seconds = self.pull(ids[i % len(ids)], num_tokens)
            assert pulled.num_bytes == num_bytes
            with_signals.append(seconds)
            return pulled.seconds

        copies = times_of(num_turns, len(ids), turn)
        for request_id in ids:
            self.source.send(ReleaseKv(request_id))
            self.source.expect(Dropped, request_id)
        return percentile(copies, 0.5), percentile(with_signals[-num_turns:], 0.5)


def ceilings(sizes: dict[int, int], num_turns: int) -> dict[int, float]:
    """Seconds of a plain memcpy for each number of tokens, printed before anything else."""
    os.sched_setaffinity(0, {CORES[-1]})
    print("ceiling: memcpy of the same bytes on the same core")
    seconds = {tokens: memcpy_seconds(size, num_turns) for tokens, size in sizes.items()}
    for tokens, size in sizes.items():
        print(f"  {tokens:5d} tokens {size / 1e6:7.2f} MB {size / seconds[tokens] / 1e9:6.1f} GB/s")
    os.sched_setaffinity(0, {CORES[0]})
    return seconds


def specs() -> list[WorkerSpec]:
    """The worker with the pages on the first core, the one that pulls on the last."""
    num_blocks = blocks_for(NUM_TOKENS[-1], BLOCK_SIZE) + 1
    spec = default_spec(
        model=FakeSettings(instant=True, block_bytes=BLOCK_BYTES).name,
        max_model_len=num_blocks * BLOCK_SIZE,
        kv_memory=4 * num_blocks * BLOCK_BYTES,
        max_num_seqs=MAX_SOURCES,
        max_num_batched_tokens=NUM_TOKENS[-1],
        cpus=(CORES[0],),
    )
    return [spec, replace(spec, index=1, cpus=(CORES[-1],))]


def run(num_turns: int) -> dict[str, object]:
    sizes = {tokens: blocks_for(tokens, BLOCK_SIZE) * BLOCK_BYTES for tokens in NUM_TOKENS}
    memcpy_s = ceilings(sizes, num_turns)
    rows: list[dict[str, float]] = []
    print("handoff: pages pulled from another process's pool")
    with started(*specs()) as [source, target]:
        target.attach(source)
        target.expect(PagesAttached)
        pair = Pair(source, target)
        for tokens, size in sizes.items():
            copy_s, signalled_s = pair.measure(tokens, num_turns)
            rows.append(
                {
                    "tokens": tokens,
                    "bytes": size,
                    "ceiling_gb_s": size / memcpy_s[tokens] / 1e9,
                    "gb_s": size / copy_s / 1e9,
                    "of_ceiling": memcpy_s[tokens] / copy_s,
                    "copy_ms": 1e3 * copy_s,
                    "with_signals_ms": 1e3 * signalled_s,
                }
            )
            show(rows[-1])
    [signalled] = [row for row in rows if row["tokens"] == SIGNALLED_TOKENS]
    return {
        "benchmark": "handoff",
        "num_turns": num_turns,
        "cores": len(CORES),
        "handoff_256_tokens_ms": signalled["with_signals_ms"],
        "sizes": rows,
    }


def show(row: dict[str, float]) -> None:
    print(
        f"  {row['tokens']:5.0f} tokens {row['gb_s']:6.1f} GB/s,"
        f" {100 * row['of_ceiling']:4.0f} % of the ceiling;"
        f" {row['copy_ms']:.3f} ms, with signals {row['with_signals_ms']:.3f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Pages between two worker processes.")
    parser.add_argument("--smoke", action="store_true", help="a few turns: does it run at all")
    emit(run(num_turns=4 if parser.parse_args().smoke else 100))


if __name__ == "__main__":
    main()
