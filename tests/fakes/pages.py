"""Pages of a model that nobody describes: one layer, one head, and workers that have all of it."""

from nodeserve.policy.copy_plan import CopyRun, PageGeometry, PageShard, shards
from nodeserve.worker.contract import Source

WHOLE = [0, 1, 0, 1]  # the place of a worker without followers, as AttachPages has it


def uncut(block_bytes: int) -> PageShard:
    """All of a block of this size."""
    return shards(PageGeometry(1, 1, block_bytes, 1, 1, parts=1))[0]


def whole_blocks(
    worker: int, fd: int, num_bytes: int, block_bytes: int, handle: bytes = b""
) -> tuple[Source, ...]:
    """A team of one worker, to copy whole blocks from."""
    runs = (CopyRun(0, 0, block_bytes),)
    return (Source(worker, fd, num_bytes, handle, block_bytes, runs),)
