"""Sizes that a GPU worker decides on: which decode steps are captured, how many KV blocks fit.

Pure: numbers in, numbers or a ConfigError with advice out.
"""

from bisect import bisect_left
from dataclasses import dataclass

from nodeserve.errors import ConfigError

MAX_GRAPH_SEQS = 512  # beyond it a step is long enough to hide its launches
GRAPH_BYTES = 8 << 20  # that CUDA takes for one captured step, above the buffers it works in
RESERVE_BYTES = 256 << 20  # left alone: kernels loaded late, the allocator's rounding
CONTEXT_BYTES = 512 << 20  # of a CUDA context with torch's libraries in it
MAX_SEGMENT_BYTES = 1 << 30  # shared memory for pages that peers cannot read on the GPU


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Numbers of sequences whose decode step is captured: 1, 2, 4, 8, 16, 24, 32, ...

    Small steps are the memory's, so a few rows more cost nothing; the gaps bound what is wasted.
    """
    limit = min(max_num_seqs, MAX_GRAPH_SEQS)
    sizes = [size for size in (1, 2, 4) if size < limit]
    sizes += range(8, min(limit, 256), 8)
    sizes += range(256, limit, 16)
    return (*sizes, limit)


def bucket_for(num_seqs: int, sizes: tuple[int, ...]) -> int | None:
    """The smallest captured size that holds `num_seqs`; None if none does. `sizes` rise."""
    place = bisect_left(sizes, num_seqs)
    return sizes[place] if place < len(sizes) else None


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Bytes of one GPU once weights and the largest step's buffers are there."""

    total: int
    free: int  # for anybody
    own: int  # taken by this worker


@dataclass(frozen=True, slots=True)
class Wanted:
    """What decides over the rest."""

    block_bytes: int
    least_blocks: int  # one sequence of the full context
    block_size: int  # tokens
    num_graphs: int
    share: int  # workers on this GPU
    utilization: float  # of its memory, by all of them
    kv_memory: int | None  # bytes of pages, where somebody said so


def num_blocks_for(memory: GpuMemory, wanted: Wanted) -> int:
    """KV blocks that requests may use; the pool has one more, for rows that only fill a batch.

    A worker alone on its GPU takes what others left of its share. Several cannot tell by the free
    bytes what the others are about to take, so each goes by what it has itself.
    """
    aside = RESERVE_BYTES + wanted.num_graphs * GRAPH_BYTES
    if wanted.kv_memory is not None:
        num_blocks = wanted.kv_memory // wanted.block_bytes
        room = memory.free - aside
        if (num_blocks + 1) * wanted.block_bytes > room:
            raise ConfigError(
                f"--kv-memory {wanted.kv_memory} is more than the {max(0, room)} bytes that are"
                " left on the GPU beside weights, activations and graphs: lower it, or leave it out"
            )
    else:
        room = _share(memory, wanted) - aside
        num_blocks = room // wanted.block_bytes - 1
    if num_blocks < wanted.least_blocks:
        raise ConfigError(_too_little(memory, wanted, num_blocks))
    return num_blocks


def _share(memory: GpuMemory, wanted: Wanted) -> int:
    """What this worker may still take of the GPU."""
    budget = int(memory.total * wanted.utilization)
    if wanted.share == 1:
        return min(budget - (memory.total - memory.free), memory.free)
    return min(budget // wanted.share - memory.own, memory.free)


def _too_little(memory: GpuMemory, wanted: Wanted, num_blocks: int) -> str:
    missing = (wanted.least_blocks - num_blocks) * wanted.block_bytes
    fits = max(0, num_blocks) * wanted.block_size
    ways = []
    if fits:
        ways.append(f"lower --max-model-len to {fits} or less")
    if wanted.kv_memory is not None:
        ways.append(f"raise --kv-memory to {wanted.least_blocks * wanted.block_bytes} or more")
    else:
        ways.append(f"raise --gpu-memory-utilization above {wanted.utilization:g}")
        ways.append("lower --max-num-batched-tokens or --max-num-seqs")
    if wanted.share > 1:
        ways.append("run fewer workers on this GPU")
    *most, last = ways
    advice = f"{', '.join(most)}, or {last}" if most else last
    return (
        f"the KV pages of one sequence of the full context take {wanted.least_blocks} blocks of"
        f" {wanted.block_bytes} bytes, and of the GPU's {memory.total} bytes {max(0, num_blocks)}"
        f" blocks are left: {missing} bytes are missing; {advice}"
    )


def num_slots_for(block_bytes: int, least_blocks: int, free: float, num_workers: int) -> int:
    """Blocks of the shared memory through which pages leave a GPU that peers cannot read.

    Of what is `free` each of the node's workers may take a part, all at the same time, and one part
    is left; one sequence of the full context must fit.
    """
    room = min(MAX_SEGMENT_BYTES, free / (num_workers + 1))
    return max(least_blocks, int(room) // block_bytes)
