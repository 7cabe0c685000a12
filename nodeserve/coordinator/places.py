"""Where each worker of a layout runs: its GPUs, or its cores; and which shapes can run at all."""

import os
from dataclasses import dataclass, replace
from typing import NamedTuple

from nodeserve.config import EngineConfig, ModelConfig, MoeConfig
from nodeserve.errors import ConfigError, ModelError
from nodeserve.gpus import Gpus
from nodeserve.layout import Layout, Shape, check_devices, parse_gpus, parse_layout
from nodeserve.shards import Place as ShardPlace
from nodeserve.shards import Shard, check_fits
from nodeserve.types import Role

GPU_SETTINGS = ("gpu_memory_utilization", "attention_backend", "handoff", "enforce_eager")
EXPERT_SETTINGS = ("expert_counts", "redundant_experts")
REAL_SETTINGS = ("dtype", "load_format", "model_impl", *EXPERT_SETTINGS, *GPU_SETTINGS)
SIM_DEVICES = 8  # unless --gpus or --layout says otherwise


@dataclass(frozen=True, slots=True)
class Place:
    """Where one worker runs."""

    role: Role
    cpus: tuple[int, ...]
    num_threads: int
    gpus: tuple[int, ...] = ()  # its own, then those it may read from; none: a CPU worker
    gpu_share: int = 1  # workers on its own GPU
    instance: int = 0  # number of its instance, in the layout's order
    rank: int = 0  # its place in the instance


class Placed(NamedTuple):
    layout: Layout
    places: tuple[Place, ...]
    notes: tuple[str, ...]


def place_on_gpus(config: EngineConfig, gpus: Gpus) -> Placed:
    """A worker on each GPU asked for, or on as many as the layout needs."""
    here = tuple(gpu.index for gpu in gpus.found)
    asked = here if config.gpus is None else parse_gpus(config.gpus)
    if unknown := sorted(set(asked) - set(here)):
        limit = "" if gpus.visible is None else f" (CUDA_VISIBLE_DEVICES is {gpus.visible!r})"
        raise ConfigError(
            f"--gpus {config.gpus}: no GPU {unknown[0]} here, there are"
            f" {', '.join(map(str, here))}{limit}"
        )
    layout = choose_layout(config.layout, len(asked))
    if config.gpus is None:
        asked = asked[: layout.num_workers]
    check_devices(layout, len(asked))
    num_threads = max(1, len(os.sched_getaffinity(0)) // len(asked))
    others = tuple(dict.fromkeys(asked))
    places = tuple(
        Place(
            role,
            cpus=(),
            num_threads=num_threads,
            gpus=(own, *(gpu for gpu in others if gpu != own)),
            gpu_share=asked.count(own),
            instance=instance,
            rank=rank,
        )
        for (role, instance, rank), own in zip(seats(layout), asked, strict=True)
    )
    return Placed(layout, places, ())


def place_on_cpus(config: EngineConfig, gpus: Gpus) -> Placed:
    """A worker on each share of the cores; says so where somebody may expect GPUs."""
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    layout = choose_layout(config.layout, min(2, len(cpus)))
    notes = []
    if config.gpus is not None:
        check_devices(layout, len(parse_gpus(config.gpus)))
        notes.append(f"CPU workers stand in for --gpus {config.gpus}: {gpus.obstacle}")
    elif gpus.found and config.device == "auto":
        notes.append(f"GPUs are here but not used: {gpus.obstacle}")
    notes += without_effect(config, GPU_SETTINGS, "CPU")
    places, more = share_cores(seats(layout), cpus)
    return Placed(layout, places, (*notes, *more))


def place_simulated(config: EngineConfig) -> Placed:
    """A worker for each rank. They mostly sleep: no core is anybody's own."""
    asked = None if config.gpus is None else len(parse_gpus(config.gpus))
    layout = choose_layout(config.layout, asked or SIM_DEVICES)
    if asked is not None:
        check_devices(layout, asked)
    places = tuple(
        Place(role, cpus=(), num_threads=1, instance=instance, rank=rank)
        for role, instance, rank in seats(layout)
    )
    return Placed(layout, places, tuple(without_effect(config, REAL_SETTINGS, "simulated")))


def without_effect(config: EngineConfig, names: tuple[str, ...], kind: str) -> list[str]:
    """A note on those of these settings that were changed and that such workers do not heed."""
    default = EngineConfig()
    changed = [name for name in names if getattr(config, name) != getattr(default, name)]
    options = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
    return [f"no effect on {kind} workers: {options}"] if changed else []


class Seat(NamedTuple):
    """One worker of a layout."""

    role: Role
    instance: int
    rank: int


def seats(layout: Layout) -> tuple[Seat, ...]:
    """A layout's workers, in order."""
    return tuple(
        Seat(group.role, instance, rank)
        for instance, group in enumerate(layout.instances)
        for rank in range(group.shape.num_workers)
    )


def choose_layout(text: str | None, num_devices: int) -> Layout:
    """The layout asked for, or half the devices for each phase."""
    split = f"{num_devices // 2}p{num_devices - num_devices // 2}d" if num_devices > 1 else "1m"
    return parse_layout(split if text is None else text)


def check_shapes(layout: Layout, model: ModelConfig) -> None:
    """ConfigError for shapes that a model does not admit."""
    for group in layout.groups:
        try:
            check_fits(model, group.shape)
        except ModelError as problem:
            raise ConfigError(f"layout {layout}: {problem}") from None


def parts_of(
    model: ModelConfig, shape: Shape, redundant_experts: int = 0
) -> tuple[ModelConfig, ...]:
    """What each worker of a team of such an instance has of a model, as a model of its own: layers,
    heads, widths, words, and of a layer's experts, of which so many are there twice, the most that
    a rank may have."""
    shards = (Shard(model, ShardPlace.of(shape, rank)) for rank in range(shape.team_size))
    return tuple(_part(shard, redundant_experts) for shard in shards)


def _part(shard: Shard, redundant_experts: int) -> ModelConfig:
    model, place = shard.whole, shard.place
    return replace(
        shard.config,
        num_layers=len(shard.layers),
        vocab_size=shard.vocab_rows if place.is_first else 0,
        moe=None if model.moe is None else _moe_part(model.moe, shard, redundant_experts),
    )


def _moe_part(moe: MoeConfig, shard: Shard, redundant_experts: int) -> MoeConfig:
    ep, layers = shard.place.ep, shard.layers
    num_slots = moe.num_experts + (redundant_experts if ep > 1 else 0)
    return replace(
        moe,
        num_experts=-(-num_slots // ep),
        intermediate_size=len(shard.inner(moe.intermediate_size)),
        shared_intermediate_size=len(shard.inner(moe.shared_intermediate_size)),
        dense_layers=tuple(one - layers.start for one in moe.dense_layers if one in layers),
    )


def share_cores(
    workers: tuple[Seat, ...], cpus: tuple[int, ...]
) -> tuple[tuple[Place, ...], tuple[str, ...]]:
    """Disjoint cores for each worker while they last, one thread for each core."""
    count = len(workers)
    if count > len(cpus):
        note = (
            f"{count} workers share {len(cpus)} cores: steps will take turns,"
            " expect uneven times per token"
        )
        shared = tuple(
            Place(role, (cpus[index % len(cpus)],), 1, instance=instance, rank=rank)
            for index, (role, instance, rank) in enumerate(workers)
        )
        return shared, (note,)
    places, first = [], 0
    for index, (role, instance, rank) in enumerate(workers):
        share = len(cpus) // count + (index < len(cpus) % count)
        own = cpus[first : first + share]
        places.append(Place(role, own, share, instance=instance, rank=rank))
        first += share
    return tuple(places), ()
