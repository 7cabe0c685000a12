"""What the workers of an instance tell each other while they compute: sums, rows, hidden states.

Between CPUs all goes through shared memory (group_memory.py). Between GPUs all goes over NCCL, one
communicator for each kind of talk, so that none waits behind another; group_host.py is for workers
that share a GPU. Nothing of torch's global state is used; who meets, and where, is the `Store` that
`connect` is given. On a GPU no call here waits on the host: what it does is ordered on torch's
current stream, and sums may be in CUDA graphs.
"""

import datetime
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore, Store

from nodeserve.errors import ConfigError, WorkerLost
from nodeserve.model.group_memory import MemoryGroup, MemoryPipe, Traffic
from nodeserve.shards import Place


class Group(Protocol):
    """Some workers of an instance, who all make the same calls in the same order.

    Nothing is said about a tensor without rows, except in `all_to_all`.
    """

    rank: int
    size: int

    def all_reduce(self, x: torch.Tensor) -> None:
        """x becomes the sum of everybody's x; the same bits on each."""

    def gather(self, x: torch.Tensor, out: torch.Tensor | None) -> None:
        """Everybody's x, stacked in rank order, into `out` [size, *x.shape], which rank 0 gives."""

    def all_to_all(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        out_counts: Sequence[int],
        in_counts: Sequence[int],
    ) -> None:
        """The next `in_counts[r]` rows of x to each rank r; `out_counts[r]` of out from there."""


class Pipe(Protocol):
    """The way between the stages of a pipeline. Tensors are contiguous, both ends know their shape.

    What is sent may be overwritten at once; nothing is sent of a tensor without rows.
    """

    def send(self, x: torch.Tensor) -> None:
        """To the next stage; does not wait for it."""

    def receive(self, out: torch.Tensor) -> None:
        """From the stage before."""

    def send_back(self, x: torch.Tensor) -> None:
        """From the last stage to the first; does not wait for it."""

    def receive_back(self, out: torch.Tensor) -> None: ...


class Alone:
    """A group of one."""

    rank = 0
    size = 1

    def all_reduce(self, x: torch.Tensor) -> None: ...

    def gather(self, x: torch.Tensor, out: torch.Tensor | None) -> None:
        assert out is not None
        out[0].copy_(x)

    def all_to_all(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        out_counts: Sequence[int],
        in_counts: Sequence[int],
    ) -> None:
        out.copy_(x)


class TorchGroup:
    """A communicator of torch's."""

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator
        self.rank: int = communicator.rank()
        self.size: int = communicator.size()

    def all_reduce(self, x: torch.Tensor) -> None:
        if x.numel():
            _finish(self._communicator.allreduce([x]))

    def gather(self, x: torch.Tensor, out: torch.Tensor | None) -> None:
        if x.numel():
            parts = [] if out is None else [list(out.unbind(0))]
            _finish(self._communicator.gather(parts, [x]))

    def all_to_all(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        out_counts: Sequence[int],
        in_counts: Sequence[int],
    ) -> None:
        _finish(self._communicator.alltoall_base(out, x, list(out_counts), list(in_counts)))


class TorchPipe:
    """A pipe of torch's; a communicator for each direction.

    With one for both, a send that waits for its receiver would stand before what it waits for.
    Nobody waits to send, for that could be in a circle: of unsent tensors there are no more than
    micro-batches under way.
    """

    def __init__(self, down: Any, back: Any) -> None:
        self._down = down
        self._back = back
        self._stage: int = down.rank()
        self._last: int = down.size() - 1
        self._unsent: deque[tuple[Any, torch.Tensor]] = deque()

    def send(self, x: torch.Tensor) -> None:
        self._send(self._down, x, self._stage + 1)

    def receive(self, out: torch.Tensor) -> None:
        self._receive(self._down, out, self._stage - 1)

    def send_back(self, x: torch.Tensor) -> None:
        self._send(self._back, x, 0)

    def receive_back(self, out: torch.Tensor) -> None:
        self._receive(self._back, out, self._last)

    def _send(self, communicator: Any, x: torch.Tensor, receiver: int) -> None:
        if not x.numel():
            return
        while self._unsent and self._unsent[0][0].is_completed():
            _finish(self._unsent.popleft()[0])
        copy = x.clone()  # kept until it is gone
        self._unsent.append((_begin(communicator.send, [copy], receiver, 0), copy))

    def _receive(self, communicator: Any, out: torch.Tensor, sender: int) -> None:
        if out.numel():
            _finish(_begin(communicator.recv, [out], sender, 0))


@dataclass(frozen=True, slots=True)
class Groups:
    """All that one worker talks to."""

    tp: Group
    ep: Group
    pipe: Pipe | None  # None: one stage
    by_host: bool = False  # calls wait for the device, and no graph can hold them

    @staticmethod
    def alone() -> "Groups":
        return Groups(Alone(), Alone(), None)


def connect(
    place: Place, store: Store, device: torch.device, traffic: Traffic, timeout_s: float
) -> Groups:
    """Meet the others of the instance at `store`; every worker calls this.

    Afterwards a peer that says nothing for `timeout_s` is a WorkerLost. Between GPUs `traffic` is
    not asked for.
    """

    def group(name: str, rank: int, size: int) -> Group:
        meeting = PrefixStore(name, store)
        if device.type == "cpu":
            return MemoryGroup(meeting, rank, size, timeout_s)
        return TorchGroup(_begin(communicator, meeting, rank, size, timeout_s))

    def pipe(name: str, stage: int, num_stages: int) -> Pipe:
        meeting = PrefixStore(name, store)
        if device.type == "cpu":
            return MemoryPipe(meeting, stage, num_stages, traffic, timeout_s)
        ways = (PrefixStore(way, meeting) for way in ("down", "back"))
        down, back = (_begin(communicator, way, stage, num_stages, timeout_s) for way in ways)
        return TorchPipe(down, back)

    groups = Groups.alone()
    tp_rank, pp_rank, ep_rank = place.tp_rank, place.pp_rank, place.ep_rank
    if place.tp > 1:
        groups = replace(groups, tp=group(f"tp.{ep_rank}.{pp_rank}", tp_rank, place.tp))
    if place.ep > 1:
        groups = replace(groups, ep=group(f"ep.{pp_rank}.{tp_rank}", ep_rank, place.ep))
    if place.pp > 1:
        groups = replace(groups, pipe=pipe(f"pipe.{ep_rank}.{tp_rank}", pp_rank, place.pp))
    return groups


def communicator(store: Store, rank: int, size: int, timeout_s: float) -> Any:
    """Of GPUs."""
    if not distributed.is_nccl_available():
        raise ConfigError(
            "this torch has no NCCL: instances of several GPUs need it, or --device cpu"
        )
    nccl: Any = distributed.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = datetime.timedelta(seconds=timeout_s)
    return nccl(store, rank, size, options)


def _begin(call: Any, *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except RuntimeError as error:
        raise _lost(error) from None


def _finish(work: Any) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise _lost(error) from None


def _lost(error: RuntimeError) -> WorkerLost:
    return WorkerLost(f"a worker of this instance cannot be reached: {str(error).splitlines()[0]}")
