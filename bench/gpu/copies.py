"""Page copies of every kind, checked byte by byte: what compute-sanitizer watches.

    python -m bench.gpu.copies [--rehearse]

Without torch, so that nothing but our kernels is watched and a run under the sanitizer takes
seconds. Bytes go from pinned host memory to a pool, to a second pool in scattered blocks and in
strided runs, and back; the last line says how much was copied.
"""

import argparse
import ctypes
import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.gpu.extension import extension

NUM_BLOCKS, BLOCK_BYTES = 96, 8192
RUN_BYTES = (16, 48, 512, 2048)
SEED = 20
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Side:
    """Blocks behind an address that devices know."""

    address: int
    num_bytes: int


class Copies:
    """Two pools, and pinned memory to fill and read them."""

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda
        self.rng = np.random.default_rng(SEED)
        self.mapping = mmap.mmap(-1, NUM_BLOCKS * BLOCK_BYTES)
        self.host: Bytes = np.frombuffer(self.mapping, np.uint8).reshape(NUM_BLOCKS, BLOCK_BYTES)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.mapping))
        self.pinned = cuda.HostPages(address, len(self.mapping))
        self.pools = [cuda.Pool(0, len(self.mapping)) for _ in range(2)]
        self.stream = cuda.Stream(0)
        self.num_bytes = self.num_launches = 0

    def copy(self, target: Side, source: Side, pairs: Any, runs: Any, method: str) -> None:
        self.num_launches += self.cuda.copy_pages(
            target.address,
            target.num_bytes,
            source.address,
            source.num_bytes,
            np.ascontiguousarray(pairs, np.int32),
            np.ascontiguousarray(runs, np.int64),
            target_stride=BLOCK_BYTES,
            source_stride=BLOCK_BYTES,
            stream=self.stream.handle,
            method=method,
        )
        self.stream.synchronize()
        self.num_bytes += len(pairs) * int(np.sum(np.asarray(runs)[:, 2]))

    def fill(self, side: Side, values: Bytes) -> None:
        self.host[:] = values
        self.copy(side, self.pinned, same_blocks(), WHOLE, "auto")

    def read(self, side: Side) -> Bytes:
        self.host[:] = 0
        self.copy(self.pinned, side, same_blocks(), WHOLE, "auto")
        return self.host.copy()

    def check(self, runs: list[tuple[int, int, int]], method: str) -> None:
        """Random values through random pairs: what is copied is right, all else is untouched."""
        source, target = self.pools
        before, data = (
            self.rng.integers(0, 256, self.host.shape, dtype=np.uint8) for _ in range(2)
        )
        self.fill(target, before)
        self.fill(source, data)
        count = int(self.rng.integers(1, NUM_BLOCKS))
        pairs = np.stack([self.rng.permutation(NUM_BLOCKS)[:count] for _ in range(2)], axis=1)
        self.copy(target, source, pairs, runs, method)
        for target_block, source_block in pairs:
            for to, start, size in runs:
                before[target_block, to : to + size] = data[source_block, start : start + size]
        if not np.array_equal(self.read(target), before):
            raise SystemExit(f"copy_pages {method} moved wrong bytes: {len(pairs)} pairs, {runs}")

    def close(self) -> None:
        for one in (self.stream, self.pinned, *self.pools):
            one.close()


WHOLE = [(0, 0, BLOCK_BYTES)]


def same_blocks() -> NDArray[np.int32]:
    return np.repeat(np.arange(NUM_BLOCKS, dtype=np.int32)[:, None], 2, axis=1)


def strided(size: int) -> list[tuple[int, int, int]]:
    """Every second run of a source block, close together in the target."""
    return [(place * size, 2 * place * size, size) for place in range(BLOCK_BYTES // size // 2)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Page copies of every kind, checked.")
    parser.add_argument("--rehearse", action="store_true", help="over a pretended CUDA runtime")
    copies = Copies(extension(parser.parse_args().rehearse))
    for method in ("kernel", "batch", "auto"):
        copies.check(WHOLE, method)
        for size in RUN_BYTES:
            copies.check(strided(size), method)
    copies.close()
    print(f"copied {copies.num_bytes} bytes in {copies.num_launches} launches")


if __name__ == "__main__":
    main()
