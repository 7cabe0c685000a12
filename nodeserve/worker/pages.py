"""The page pool: the memory of a worker's KV blocks, shared with the peers that pull from it.

The coordinator made the segment, empty and nameless, and every worker inherited its descriptor; the
owner gives it its size here, once it knows how many bytes a block takes. Peers map it read-only.

All memory is reserved at the start, so that a full /dev/shm (64 MB in a container that was given no
more) is an error with advice and not a SIGBUS in the middle of a request. The first WARM_BYTES,
which the allocator hands out first and again and again, are also mapped in advance, by the owner
and by each peer: left to faults, the first handoff of 256 tokens takes 8 ms instead of 0.4.
Measured: reserving 1 GB takes 0.25 s of CPU time, mapping 128 MB in advance 0.03 s more (512 MB:
0.15 to 1.2 s), at a peer 0.02 s; faults one by one 0.2 s, in every process again. Huge pages change
nothing where the system keeps them from shared memory (shmem_enabled = never, the default).
"""

import errno
import math
import mmap
import os

from nodeserve.errors import ConfigError

WARM_BYTES = 128 << 20  # 5,700 tokens of the demo model
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23  # Python has no names for them


def num_blocks_in(kv_memory: int, block_bytes: int, least: int) -> int:
    """Blocks that fit `kv_memory`; ConfigError if fewer than `least`, one sequence's."""
    num_blocks = kv_memory // block_bytes
    if num_blocks < least:
        raise ConfigError(
            f"--kv-memory {kv_memory} holds {num_blocks} KV blocks of {block_bytes} bytes; one"
            f" sequence of the full context takes {least}: give {least * block_bytes} or more, or"
            " a smaller --max-model-len"
        )
    return num_blocks


def make_pool(fd: int, num_bytes: int) -> mmap.mmap:
    """Size, reserve and map the segment behind `fd`. Zeroed when it is new.

    It may be that of an earlier life of this worker. Then it never gets smaller: a peer that has
    not heard of the end yet still maps all of it.
    """
    if num_bytes > (free := free_bytes(fd)):  # asked first: reserving what is there takes seconds
        raise ConfigError(_no_room(num_bytes, free))
    size_before = os.fstat(fd).st_size
    try:
        os.ftruncate(fd, max(num_bytes, size_before))
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise
        os.ftruncate(fd, size_before)  # give back what was reserved before somebody took the rest
        raise ConfigError(_no_room(num_bytes, free_bytes(fd))) from None
    pool = mmap.mmap(fd, num_bytes)
    _warm(pool, _MADV_POPULATE_WRITE)
    return pool


def free_bytes(fd: int) -> float:
    """Room for `fd` in its file system, with what it has already."""
    room = os.fstatvfs(fd)
    if not room.f_blocks:  # a tmpfs without a limit
        return math.inf
    return room.f_bavail * room.f_frsize + os.fstat(fd).st_blocks * 512


def _no_room(num_bytes: int, free: float) -> str:
    return (
        f"the KV pages need {num_bytes} bytes of shared memory and {free:.0f} are free: give a"
        " smaller --kv-memory, or more shared memory (docker: --shm-size)"
    )


def map_peer(fd: int, num_bytes: int) -> mmap.mmap:
    """A peer's pool, to read from; ConfigError if it is smaller than announced."""
    size = os.fstat(fd).st_size
    if size < num_bytes:
        raise ConfigError(f"a peer's pages have {size} bytes, {num_bytes} were announced")
    peer = mmap.mmap(fd, num_bytes, prot=mmap.PROT_READ)
    _warm(peer, _MADV_POPULATE_READ)
    return peer


def _warm(pages: mmap.mmap, advice: int) -> None:
    try:
        pages.madvise(advice, 0, min(len(pages), WARM_BYTES))
    except OSError as problem:
        if problem.errno != errno.EINVAL:  # Linux before 5.14 does not know it: faults will do
            raise
