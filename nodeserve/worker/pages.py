"""The page pool: the memory of a worker's KV blocks, shared with the peers that pull from it.

The coordinator made the segment, empty and nameless, and every worker inherited its descriptor; the
owner gives it its size here, once it knows how many bytes a block takes. Peers map it read-only.

All memory is reserved at the start, so that a full /dev/shm (64 MB in a container that was given no
more) is an error with advice and not a SIGBUS in the middle of a request. Measured for 256 MB:
reserving takes 56 ms and leaves 105 ms of page faults to the first use of each block; touching
everything at the start takes 146 ms; leaving all to the first use 198 ms, and no promise. Reserving
it is: blocks are reused last in, first out, so most of a pool is touched late or never. Huge pages
change nothing where the system keeps them from shared memory (shmem_enabled = never, the default).
"""

import errno
import mmap
import os

from nodeserve.errors import ConfigError


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
    """Size, reserve and map the segment behind `fd`. Zeroed when it is new."""
    try:
        os.ftruncate(fd, num_bytes)
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise
        raise ConfigError(_no_room(fd, num_bytes)) from None
    pool = mmap.mmap(fd, num_bytes)
    pool.madvise(mmap.MADV_HUGEPAGE)
    return pool


def _no_room(fd: int, num_bytes: int) -> str:
    os.ftruncate(fd, 0)  # give back what was reserved before the room ran out
    room = os.fstatvfs(fd)
    free = room.f_bavail * room.f_frsize
    return (
        f"the KV pages need {num_bytes} bytes of shared memory and {free} are free: give a smaller"
        " --kv-memory, or more shared memory (docker: --shm-size)"
    )


def map_peer(fd: int, num_bytes: int) -> mmap.mmap:
    """A peer's pool, to read from; ConfigError if it is smaller than announced."""
    size = os.fstat(fd).st_size
    if size < num_bytes:
        raise ConfigError(f"a peer's pages have {size} bytes, {num_bytes} were announced")
    return mmap.mmap(fd, num_bytes, prot=mmap.PROT_READ)
