"""How workers that share a GPU reach each other: by way of the host, as workers on CPUs do.

NCCL refuses two ranks on one GPU. Here every call waits for the device and copies there and back,
so nothing overlaps and nothing can be captured: for trying shapes where there are fewer GPUs than
workers, not for speed.
"""

from collections.abc import Sequence

import torch
from torch.distributed.distributed_c10d import Store

from nodeserve.model import group
from nodeserve.model.group import Group, Groups, Pipe
from nodeserve.model.group_memory import Traffic
from nodeserve.shards import Place


def connect(
    place: Place, store: Store, device: torch.device, traffic: Traffic, timeout_s: float
) -> Groups:
    """As group.connect, also where workers share a GPU; every worker calls this."""
    if device.type == "cpu" or not share_a_gpu(place, store, gpu_name(device)):
        return group.connect(place, store, device, traffic, timeout_s)
    return through_host(group.connect(place, store, torch.device("cpu"), traffic, timeout_s))


def gpu_name(device: torch.device) -> str:
    """The same in every process that has this GPU, under whatever number."""
    return str(torch.cuda.get_device_properties(device).uuid)


def share_a_gpu(place: Place, store: Store, own: str) -> bool:
    """Whether any two workers of the instance have the same; every worker calls this."""
    store.set(f"gpu.{place.rank}", own)
    names = [store.get(f"gpu.{rank}") for rank in range(place.shape.num_workers)]
    return len(set(names)) < len(names)


def through_host(groups: Groups) -> Groups:
    """For tensors on a GPU, over groups of processors."""
    tp, ep = (HostGroup(one) if one.size > 1 else one for one in (groups.tp, groups.ep))
    return Groups(tp, ep, groups.pipe and HostPipe(groups.pipe), by_host=True)


class HostGroup:
    """What group.Group asks for, over a group of processors."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self.rank = group.rank
        self.size = group.size

    def all_reduce(self, x: torch.Tensor) -> None:
        """In float32, whatever x is."""
        if x.numel():
            host = _on_host(x.float())
            self._group.all_reduce(host)
            x.copy_(host)

    def gather(self, x: torch.Tensor, out: torch.Tensor | None) -> None:
        if x.numel():
            host = None if out is None else _like(out)
            self._group.gather(_on_host(x), host)
            if out is not None and host is not None:
                out.copy_(host)

    def all_to_all(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        out_counts: Sequence[int],
        in_counts: Sequence[int],
    ) -> None:
        host = _like(out)
        self._group.all_to_all(host, _on_host(x), out_counts, in_counts)
        out.copy_(host)


class HostPipe:
    """What group.Pipe asks for, over a pipe of processors."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe

    def send(self, x: torch.Tensor) -> None:
        self._pipe.send(_on_host(x))

    def receive(self, out: torch.Tensor) -> None:
        host = _like(out)
        self._pipe.receive(host)
        out.copy_(host)

    def send_back(self, x: torch.Tensor) -> None:
        self._pipe.send_back(_on_host(x))

    def receive_back(self, out: torch.Tensor) -> None:
        host = _like(out)
        self._pipe.receive_back(host)
        out.copy_(host)


def _on_host(x: torch.Tensor) -> torch.Tensor:
    """Copied when all that computes x is over; always a copy, also of what is there already."""
    return x.detach().to("cpu", copy=True).contiguous()


def _like(out: torch.Tensor) -> torch.Tensor:
    return torch.empty(out.shape, dtype=out.dtype)
