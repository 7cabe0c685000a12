"""A prompt's pages from another process's pool, against a plain copy of as many bytes.

Both read and write device memory, so the plain copy is the ceiling. Blocks are scattered over the
pools as they are after hours of serving. The host road is measured against plain pinned copies.
"""

import ctypes
import mmap
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.gpu.bed import Bed
from bench.gpu.extension import extension
from bench.gpu.lines import share
from bench.gpu.measure import median_s
from bench.gpu.memory import settle
from bench.gpu.peers import owner
from bench.gpu.shards import Whole, ranks_of

BLOCK_SIZE = 16
PROMPTS = (2048, 8192)
AIM = 0.8
METHODS = ("auto", "kernel", "batch")


def run(bed: Bed) -> None:
    config = bed.model
    whole = Whole(config.num_layers, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
    prompts = bed.pick(PROMPTS, (64, 128))
    num_blocks = 2 * max(prompts) // BLOCK_SIZE
    pulls = Pulls(bed, whole, num_blocks)
    with owner(bed.rehearsal) as peer:
        exported = peer.make(whole, ranks_of(whole, 1), num_blocks, generation=1)
        pulls.open(exported.pools[0].handle)
        for num_tokens in prompts:
            pulls.measure(num_tokens)
        pulls.close()
        peer.close()


class Pulls:
    """Two pools of the model's blocks, the peer's and ours, and pinned memory in between."""

    def __init__(self, bed: Bed, whole: Whole, num_blocks: int) -> None:
        self.bed = bed
        self.cuda = extension(bed.rehearsal)
        self.block_bytes = ranks_of(whole, 1)[0].block_bytes(whole)
        self.num_blocks = num_blocks
        self.pool = self.cuda.Pool(0, num_blocks * self.block_bytes)
        self.stream = self.cuda.Stream(0)
        self.peer: Any = None
        self.repeats = bed.pick(20, 2)

    def open(self, handle: bytes) -> None:
        self.peer = self.cuda.PeerPool(0, handle, self.pool.num_bytes)

    def close(self) -> None:
        for one in (self.peer, self.stream, self.pool):
            one.close()

    def measure(self, num_tokens: int) -> None:
        count = num_tokens // BLOCK_SIZE
        num_bytes = count * self.block_bytes
        plain_s = self.plain(num_bytes)
        for method in METHODS:
            seconds = self.pull_s(self.peer, self.pool, count, method)
            line = share(
                f"handoff of {num_tokens} tokens, {method}",
                num_bytes / seconds / 1e9,
                "GB/s",
                plain_s / seconds,
                self.bed.aim(AIM) if method == "auto" else None,
                f"{num_bytes / 1e6:.0f} MB in {1e3 * seconds:.3f} ms,"
                f" a plain copy {1e3 * plain_s:.3f} ms",
                num_bytes=num_bytes,
                seconds=seconds,
                plain_s=plain_s,
            )
            self.bed.sheet.add(line)
        self.host(num_tokens, count)

    def plain(self, num_bytes: int) -> float:
        source = torch.empty(num_bytes // 4, dtype=torch.float32, device=self.bed.device).normal_()
        target = torch.empty_like(source)
        return median_s(lambda: target.copy_(source), self.bed.device, self.repeats)

    def pull_s(self, source: Any, target: Any, count: int, method: str) -> float:
        """Median seconds of the copy on its stream, other blocks each time."""
        runs = torch.tensor([[0, 0, self.block_bytes]]).numpy()

        def copy(pairs: Any) -> None:
            self.cuda.copy_pages(
                target.address,
                target.num_bytes,
                source.address,
                source.num_bytes,
                pairs,
                runs,
                target_stride=self.block_bytes,
                source_stride=self.block_bytes,
                stream=self.stream.handle,
                method=method,
            )

        return self.on_stream_s([partial(copy, self.pairs(count)) for _ in range(self.repeats + 2)])

    def pairs(self, count: int) -> Any:
        """[count, 2] int32: blocks anywhere in both pools."""
        order = [torch.randperm(self.num_blocks, dtype=torch.int32)[:count] for _ in range(2)]
        return torch.stack(order, dim=1).numpy()

    def on_stream_s(self, calls: list[Callable[[], None]]) -> float:
        """Without the first two. All are enqueued before the first is waited for: a copy is over
        in the time that it takes to ask for some, which is not the copy's."""
        event = partial(self.cuda.Event, 0, timed=True)
        marks = [(event(), event()) for _ in calls]
        for (first, last), call in zip(marks, calls, strict=True):
            first.record(self.stream.handle)
            call()
            last.record(self.stream.handle)
        self.stream.synchronize()
        times = [last.elapsed_ms(first) / 1e3 for first, last in marks]
        return float(statistics.median(times[2:]))

    def host(self, num_tokens: int, count: int) -> None:
        """Out to pinned memory and in again; in a handoff two workers do one half each."""
        mapping = mmap.mmap(-1, self.pool.num_bytes)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        pinned = self.cuda.HostPages(address, self.pool.num_bytes)
        num_bytes = count * self.block_bytes
        for name, source, target in (("out", self.pool, pinned), ("in", pinned, self.pool)):
            plain_s = self.plain_host(num_bytes, out=name == "out")
            seconds = self.pull_s(source, target, count, "auto")
            line = share(
                f"host road, {name}, {num_tokens} tokens",
                num_bytes / seconds / 1e9,
                "GB/s",
                plain_s / seconds,
                note="against a plain pinned copy",
            )
            self.bed.sheet.add(line)
        pinned.close()

    def plain_host(self, num_bytes: int, out: bool) -> float:
        pin = not self.bed.rehearsal
        host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pin).fill_(1)
        there = torch.empty(num_bytes, dtype=torch.uint8, device=self.bed.device).fill_(2)
        settle(self.bed.device)
        target, source = (host, there) if out else (there, host)
        copy = lambda: target.copy_(source, non_blocking=True)  # noqa: E731
        return median_s(copy, self.bed.device, self.repeats)
