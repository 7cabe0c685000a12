"""Which KV blocks of one worker are free.

Always true: free and used are disjoint and together are all blocks. An allocation happens wholly or
not at all. Freed blocks are handed out again first (they are warm in cache and already backed by
memory). Only the worker that owns the pool allocates and releases.
"""

from nodeserve.errors import OutOfBlocks


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens`."""
    return -(-num_tokens // block_size)


def watermark(num_blocks: int) -> int:
    """Blocks of a pool of `num_blocks` that newcomers leave to sequences that decode already."""
    return max(1, num_blocks // 100)


class BlockAllocator:
    """Free list over block ids 0 to num_blocks - 1."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks`; OutOfBlocks when fewer are free, and then none is taken."""
        if num_blocks > len(self._free):
            raise OutOfBlocks(f"want {num_blocks} KV blocks, have {len(self._free)}")
        first = len(self._free) - num_blocks
        taken = self._free[first:]
        del self._free[first:]
        taken.reverse()
        self._used.update(taken)
        return taken

    def release(self, block_ids: list[int]) -> None:
        """Give blocks back. A block that is not in use is a double free: our bug, let it crash."""
        num_left = len(self._used) - len(block_ids)
        self._used.difference_update(block_ids)
        assert len(self._used) == num_left, "a block that is not in use"
        self._free.extend(reversed(block_ids))

    def check(self) -> None:
        """Cheap audit: nothing is lost, nothing is in both places."""
        assert len(self._free) + len(self._used) == self.num_blocks
        assert self._used.isdisjoint(self._free)
