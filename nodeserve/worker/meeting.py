"""Where the workers of an instance meet before they can compute together."""

import torch
from torch import distributed

from nodeserve.config import WorkerSpec
from nodeserve.layout import Shape
from nodeserve.model.group import Groups, connect
from nodeserve.shards import Place

# Longer than anything takes. A member that ends is noticed at once, and one that hangs by the
# coordinator: this is for nobody's rescue.
SILENCE_S = 24 * 3600.0


def place_of(spec: WorkerSpec) -> Place:
    return Place.of(Shape(spec.tp, spec.pp, spec.ep), spec.rank)


def meet(spec: WorkerSpec, device: torch.device) -> Groups:
    """Everybody this worker talks to; waits for them. They meet in memory that nobody else has."""
    place = place_of(spec)
    if place.shape.num_workers == 1:
        return Groups.alone()
    path = f"/proc/self/fd/{spec.rendezvous_fd}"
    store = distributed.FileStore(path, place.shape.num_workers)  # type: ignore[attr-defined]
    return connect(place, store, device, SILENCE_S)
