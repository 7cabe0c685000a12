"""The group of CPU workers: collectives through memory that they share, without any socket.

Rank 0 makes the memory without a name and says at the store where it is; the others map it through
/proc. When all have, nothing of it remains but their maps.
"""

import mmap
import os
from collections.abc import Sequence

import torch
from torch.distributed.distributed_c10d import Store

from nodeserve import _host
from nodeserve.errors import WorkerLost

SLOT_BYTES = 1 << 20  # what moves in one round: hidden states of 455 tokens of SmolLM2


class MemoryGroup:
    """What group.Group asks for."""

    def __init__(self, store: Store, rank: int, size: int, timeout_s: float) -> None:
        """Meet the others at `store`, each under its rank."""
        self.rank = rank
        self.size = size
        memory = _meet(store, rank, size, _host.meeting_bytes(size, SLOT_BYTES))
        self._meeting = _host.Meeting(memory, rank, size, timeout_s)

    def all_reduce(self, x: torch.Tensor) -> None:
        """x float32; added in the order of ranks, so a value's bits do not depend on its place."""
        assert x.dtype == torch.float32 and x.is_contiguous()
        if x.numel():
            try:
                self._meeting.all_reduce(x.data_ptr(), x.numel())
            except RuntimeError as error:
                raise _lost(error) from None

    def gather(self, x: torch.Tensor, out: torch.Tensor | None) -> None:
        assert x.is_contiguous() and (out is None or out.is_contiguous())
        if x.numel():
            target = 0 if out is None else out.data_ptr()
            try:
                self._meeting.gather(x.data_ptr(), x.nbytes, target)
            except RuntimeError as error:
                raise _lost(error) from None

    def all_to_all(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        out_counts: Sequence[int],
        in_counts: Sequence[int],
    ) -> None:
        assert x.is_contiguous() and out.is_contiguous() and x.shape[1:] == out.shape[1:]
        row_bytes = x[0].nbytes if len(x) else out[0].nbytes if len(out) else 0
        given = [row_bytes * count for count in in_counts]
        taken = [row_bytes * count for count in out_counts]
        try:
            self._meeting.all_to_all(x.data_ptr(), given, out.data_ptr(), taken)
        except RuntimeError as error:
            raise _lost(error) from None


def _meet(store: Store, rank: int, size: int, num_bytes: int) -> mmap.mmap:
    """The memory that all ranks map."""
    if rank:
        where = store.get("memory").decode()
        descriptor = os.open(where, os.O_RDWR | os.O_CLOEXEC)
    else:
        descriptor = os.memfd_create("nodeserve-group", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, num_bytes)
        store.set("memory", f"/proc/{os.getpid()}/fd/{descriptor}")
    memory = mmap.mmap(descriptor, num_bytes)
    store.set(f"mapped.{rank}", "")
    if rank == 0:  # the descriptor is how the others get there
        store.wait([f"mapped.{other}" for other in range(size)])
    os.close(descriptor)
    return memory


def _lost(error: RuntimeError) -> WorkerLost:
    return WorkerLost(f"a worker of this instance cannot be reached: {error}")
