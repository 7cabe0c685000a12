"""Where the workers of an instance meet before they can compute together."""

import datetime
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from nodeserve.config import WorkerSpec
from nodeserve.layout import Shape
from nodeserve.model.group import Groups
from nodeserve.model.group_host import connect
from nodeserve.model.group_memory import Traffic
from nodeserve.shards import Place

# Longer than anything takes. The coordinator notices a member that ends or hangs and ends the
# others: this is for nobody's rescue.
SILENCE_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Meeting:
    """All workers of an instance are here, or on their way."""

    place: Place
    groups: Groups
    store: Any = None  # None: there is one

    def least(self, name: str, value: int) -> int:
        """The smallest of the team's values; waits until each has told its own."""
        if self.store is None:
            return value
        first = self.place.ep_rank * self.place.pp * self.place.tp
        self.store.set(f"{name}.{self.place.rank}", str(value))
        members = range(first, first + self.place.pp * self.place.tp)
        return min(int(self.store.get(f"{name}.{rank}")) for rank in members)


def place_of(spec: WorkerSpec) -> Place:
    return Place.of(Shape(spec.tp, spec.pp, spec.ep), spec.rank)


def traffic_of(spec: WorkerSpec, hidden_size: int) -> Traffic:
    """Between our stages: a step for each may be under way, whose rows are float32 at most."""
    row_bytes = hidden_size * torch.float32.itemsize
    return Traffic(spec.pp, spec.max_num_batched_tokens * row_bytes, spec.max_num_seqs * row_bytes)


def meet(spec: WorkerSpec, device: torch.device, hidden_size: int) -> Meeting:
    """Connected to everybody this worker talks to; waits for them, in memory that nobody else
    has."""
    place = place_of(spec)
    if place.shape.num_workers == 1:
        return Meeting(place, Groups.alone())
    path = f"/proc/self/fd/{spec.rendezvous_fd}"
    store = distributed.FileStore(path, place.shape.num_workers)  # type: ignore[attr-defined]
    store.set_timeout(datetime.timedelta(seconds=SILENCE_S))  # else it gives up in five minutes
    groups = connect(place, store, device, traffic_of(spec, hidden_size), SILENCE_S)
    return Meeting(place, groups, store)
