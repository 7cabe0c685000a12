"""What members of a group say to each other, for test_group."""

import datetime
import os
from typing import Any

import torch
from torch import distributed

from nodeserve.errors import TeamError, WorkerLost
from nodeserve.model.group import Group, Groups, Pipe, TorchGroup, TorchPipe
from nodeserve.model.group_host import through_host
from nodeserve.shards import Place

NUM_SENT = 20
_alive: list[TorchPipe] = []  # what is still being sent goes with its pipe


def gloo(name: str, folder: str, rank: int, size: int) -> Any:
    """A communicator as GPUs have it over NCCL."""
    make: Any = distributed.FileStore  # type: ignore[attr-defined]
    kind: Any = distributed.ProcessGroupGloo
    options = kind._Options()
    options._devices = [kind.create_device(hostname="127.0.0.1")]
    options._timeout = datetime.timedelta(seconds=30.0)
    return kind(make(f"{folder}/{name}", size), rank, size, options)


def group_of(kind: str, place: Place, groups: Groups, folder: str) -> Group:
    """The one that CPU workers use, the one of workers that share a GPU, or torch's, which other
    GPUs use."""
    if kind != "torch":
        return groups.tp if kind == "memory" else through_host(groups).tp
    return TorchGroup(gloo("tp", folder, place.tp_rank, place.tp))


def pipe_of(kind: str, place: Place, groups: Groups, folder: str) -> Pipe:
    """Likewise."""
    if kind == "torch":
        down, back = (gloo(way, folder, place.pp_rank, place.pp) for way in ("down", "back"))
        _alive.append(TorchPipe(down, back))
        return _alive[-1]
    pipe = groups.pipe if kind == "memory" else through_host(groups).pipe
    assert pipe is not None
    return pipe


def collectives(place: Place, groups: Groups, kind: str, folder: str) -> dict[str, Any]:
    group, rank = group_of(kind, place, groups, folder), place.tp_rank
    x = torch.arange(6.0).view(2, 3) * (rank + 1)
    group.all_reduce(x)
    group.all_reduce(torch.zeros(0, 3))  # nobody waits for nothing
    out = torch.zeros(group.size, 2) if rank == 0 else None
    group.gather(torch.tensor([rank, 10.0 * rank]), out)
    # Rank r gives s + r rows to each s, of the value 100 r + s.
    counts = [taker + rank for taker in range(group.size)]
    given = torch.cat([torch.full((n, 2), 100.0 * rank + s) for s, n in enumerate(counts)])
    taken_counts = [rank + giver for giver in range(group.size)]
    taken = torch.zeros(sum(taken_counts), 2)
    group.all_to_all(taken, given, taken_counts, counts)
    gathered = [] if out is None else out.tolist()
    return {"sum": x.tolist(), "gathered": gathered, "taken": taken[:, 0].tolist()}


def stages(place: Place, groups: Groups, kind: str, folder: str) -> list[float]:
    """The first sends all before it takes any, the others pass it on, the last sends it back."""
    pipe = pipe_of(kind, place, groups, folder)
    got, found = torch.zeros(50, 100), []
    for number in range(NUM_SENT if not place.is_first else 0):
        pipe.receive(got)
        if place.is_last:
            pipe.send_back(got[:2] + number)
        else:
            pipe.send(got)
    if place.is_first:
        for number in range(NUM_SENT):
            mine = torch.full((50, 100), float(number))
            pipe.send(mine)
            mine.fill_(-1.0)  # it is ours again at once
        for _ in range(NUM_SENT):
            pipe.receive_back(got[:2])
            found.append(float(got[1, 99]))
        pipe.send(got[:0])  # nothing
    return found


def strangers(place: Place, groups: Groups) -> str:
    """Both stages know another shape; what the one that receives is told."""
    assert groups.pipe is not None
    if place.is_first:
        groups.pipe.send(torch.zeros(3))
        return ""
    try:
        groups.pipe.receive(torch.zeros(4))
    except TeamError as error:
        return str(error)
    return "nothing"


def disagree(place: Place, groups: Groups) -> str:
    """The first gives a row less than the second takes; what that one is told."""
    x, out = torch.zeros(4, 2), torch.zeros(4, 2)
    counts = [2, 1] if place.tp_rank == 0 else [2, 2]
    try:
        groups.tp.all_to_all(out, x, [2, 2], counts)
    except (TeamError, WorkerLost) as error:
        return str(error)
    return "nothing"


def left_alone(place: Place, groups: Groups) -> str:
    """The last worker ends without a word; what the others are told."""
    if place.rank == place.shape.num_workers - 1:
        os._exit(0)
    try:
        if groups.pipe is not None:
            groups.pipe.receive_back(torch.zeros(3))
        else:
            groups.tp.all_reduce(torch.zeros(3))
    except WorkerLost as error:
        return str(error)
    return "nothing"
