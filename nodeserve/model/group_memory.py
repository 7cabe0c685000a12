"""How CPU workers reach each other: through memory that they share, without any socket.

Rank 0 makes the memory without a name and says at the store where it is; the others map it through
/proc. When all have, nothing of it remains but their maps.
"""

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.distributed_c10d import Store

from nodeserve import _host
from nodeserve.errors import TeamError, WorkerLost

LINE_BYTES = 64  # of csrc/group/word.h
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
                raise _typed(error) from None

    def gather(self, x: torch.Tensor, out: torch.Tensor | None) -> None:
        assert x.is_contiguous() and (out is None or out.is_contiguous())
        if x.numel():
            target = 0 if out is None else out.data_ptr()
            try:
                self._meeting.gather(x.data_ptr(), x.nbytes, target)
            except RuntimeError as error:
                raise _typed(error) from None

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
        except (RuntimeError, ValueError) as error:
            raise _typed(error) from None


@dataclass(frozen=True, slots=True)
class Traffic:
    """What is under way at most between two stages of a pipeline: messages, and bytes of one."""

    num_messages: int
    down_bytes: int  # from a stage to the next one
    back_bytes: int  # from the last one to the first


class MemoryPipe:
    """What decoder.Pipe asks for: from each stage a way to the next one, and from the last one to
    the first. With room on it for all that is under way nobody waits to send."""

    def __init__(
        self, store: Store, stage: int, num_stages: int, traffic: Traffic, timeout_s: float
    ) -> None:
        """Meet the other stages at `store`."""
        messages = [traffic.down_bytes] * (num_stages - 1) + [traffic.back_bytes]
        sizes = [_host.pipe_bytes(traffic.num_messages * _in_lines(one)) for one in messages]
        memory = memoryview(_meet(store, stage, num_stages, sum(sizes)))
        starts = [sum(sizes[:index]) for index in range(num_stages)]
        ways = [memory[start : start + size] for start, size in zip(starts, sizes, strict=True)]
        self._to, self._from = (_host.Pipe(ways[one], timeout_s) for one in (stage, stage - 1))

    def send(self, x: torch.Tensor) -> None:
        assert x.is_contiguous()
        if x.numel():
            try:
                self._to.send(x.data_ptr(), x.nbytes)
            except RuntimeError as error:
                raise _typed(error) from None

    def receive(self, out: torch.Tensor) -> None:
        assert out.is_contiguous()
        if out.numel():
            try:
                self._from.receive(out.data_ptr(), out.nbytes)
            except (RuntimeError, ValueError) as error:
                raise _typed(error) from None

    def send_back(self, x: torch.Tensor) -> None:
        self.send(x)  # the first stage is the one behind the last

    def receive_back(self, out: torch.Tensor) -> None:
        self.receive(out)


def _in_lines(num_bytes: int) -> int:
    """What a message of that many takes of a way's room."""
    return LINE_BYTES * (1 + -(-num_bytes // LINE_BYTES))


def _meet(store: Store, rank: int, size: int, num_bytes: int) -> mmap.mmap:
    """The memory that all ranks map."""
    if rank:
        where = store.get("memory").decode()
        try:
            descriptor = os.open(where, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:  # it ended meanwhile
            raise _unreachable(error) from None
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


def _typed(error: RuntimeError | ValueError) -> WorkerLost | TeamError:
    """Of somebody who does not come, or who says another amount than we do."""
    if isinstance(error, RuntimeError):
        return _unreachable(error)
    return TeamError(f"workers of this instance compute different steps: {error}")


def _unreachable(error: Exception) -> WorkerLost:
    return WorkerLost(f"a worker of this instance cannot be reached: {error}")
