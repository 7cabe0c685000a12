"""Which bytes of a peer's block belong where in ours: the copy plan of a handoff.

A block holds the KV of `block_size` tokens in one contiguous run,
`[num_layers, parts, num_kv_heads, block_size, head_dim]`. Instances of different shapes keep
different parts of the model: a shard is some layers (pipeline stages) and some KV heads (tensor
ranks) of it. A plan is a few runs of bytes inside a block, the same for every block, and it depends
on nothing but the two shards. An MLA model has one latent vector per token instead of K and V of
several heads: `parts` is 1, and there is one "head" that every tensor rank holds. Where a device
keeps K and V of a head side by side, `parts` is 1 as well, and the two are one page.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nodeserve.errors import ConfigError
from nodeserve.shards import kv_head_range, share

Cell = tuple[int, int]  # layer, KV head


@dataclass(frozen=True, slots=True)
class PageGeometry:
    """What all shards of one model have in common."""

    num_layers: int
    num_kv_heads: int
    block_size: int  # tokens
    head_dim: int
    value_bytes: int
    parts: int = 2  # K and V; 1: one latent page, or both in one

    @property
    def page_bytes(self) -> int:
        """Of one part of one head: the smallest piece that a plan moves."""
        return self.block_size * self.head_dim * self.value_bytes


@dataclass(frozen=True, slots=True)
class PageShard:
    """The layers and KV heads that one worker keeps, numbered as in the whole model."""

    geometry: PageGeometry
    layers: range
    kv_heads: range

    def __post_init__(self) -> None:
        whole = self.geometry
        for name, mine, limit in (
            ("layers", self.layers, whole.num_layers),
            ("kv_heads", self.kv_heads, whole.num_kv_heads),
        ):
            if mine.step != 1 or not 0 <= mine.start < mine.stop <= limit:
                raise ConfigError(f"{name} must be a rising range within {limit}, got {mine}")

    @property
    def block_bytes(self) -> int:
        num_pages = len(self.layers) * self.geometry.parts * len(self.kv_heads)
        return num_pages * self.geometry.page_bytes

    @property
    def cells(self) -> set[Cell]:
        return {(layer, head) for layer in self.layers for head in self.kv_heads}

    def offset(self, layer: int, part: int, kv_head: int) -> int:
        """Bytes from the start of a block to this page."""
        row = (layer - self.layers.start) * self.geometry.parts + part
        page = row * len(self.kv_heads) + kv_head - self.kv_heads.start
        return page * self.geometry.page_bytes


class CopyRun(NamedTuple):
    """Offsets inside a target and a source block, in bytes; the columns of `copy_pages`' runs."""

    target: int
    source: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Pull:
    """What a worker copies from one of its sources."""

    source_index: int
    runs: tuple[CopyRun, ...]


def shards(geometry: PageGeometry, tp: int = 1, pp: int = 1) -> tuple[PageShard, ...]:
    """All shards of an instance, in the order of its workers: the ranks of stage 0, then of 1."""
    return tuple(
        PageShard(
            geometry,
            share(geometry.num_layers, pp, stage),
            kv_head_range(geometry.num_kv_heads, rank, tp),
        )
        for stage in range(pp)
        for rank in range(tp)
    )


def copy_runs(target: PageShard, source: PageShard) -> tuple[CopyRun, ...]:
    """What both shards hold, as runs without gaps; one run for equal shards, none for disjoint."""
    if target.geometry != source.geometry:
        raise ConfigError(
            f"the two pools hold different pages: {target.geometry} and {source.geometry}"
        )
    layers = _common(target.layers, source.layers)
    heads = _common(target.kv_heads, source.kv_heads)
    num_bytes = len(heads) * target.geometry.page_bytes
    rows = [(layer, part) for layer in layers for part in range(target.geometry.parts)]
    if not heads:
        return ()
    return _joined(
        CopyRun(target.offset(*row, heads.start), source.offset(*row, heads.start), num_bytes)
        for row in rows
    )


def pulls(target: PageShard, sources: Sequence[PageShard], first: int = 0) -> tuple[Pull, ...]:
    """What to copy from which source so that each byte of the target's block arrives once.

    Of sources that hold the same (heads are replicated above `num_kv_heads` tensor ranks), number
    `first`, counted around, is asked: with the worker's own number, equal instances pull rank from
    rank and replicas share the work. ConfigError when a page is nowhere, or two sources overlap in
    part.
    """
    holders: dict[tuple[range, range], list[int]] = {}  # of common layers and heads
    for index, source in enumerate(sources):
        layers = _common(target.layers, source.layers)
        heads = _common(target.kv_heads, source.kv_heads)
        if layers and heads:
            holders.setdefault((layers, heads), []).append(index)
    missing = target.cells
    found = []
    for (layers, heads), indices in holders.items():
        common = {(layer, head) for layer in layers for head in heads}
        if not common <= missing:
            index = indices[0]
            raise ConfigError(f"source {index} overlaps in part with another: {sources[index]}")
        missing -= common
        index = indices[first % len(indices)]
        found.append(Pull(index, copy_runs(target, sources[index])))
    if missing:
        layer, head = min(missing)
        raise ConfigError(f"no source has layer {layer}, KV head {head} of the pages")
    return tuple(found)


def _common(first: range, second: range) -> range:
    return range(max(first.start, second.start), min(first.stop, second.stop))


def _joined(runs: Iterable[CopyRun]) -> tuple[CopyRun, ...]:
    joined: list[CopyRun] = []
    for run in runs:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.target + last.num_bytes == run.target
            and last.source + last.num_bytes == run.source
        ):
            joined[-1] = CopyRun(last.target, last.source, last.num_bytes + run.num_bytes)
        else:
            joined.append(run)
    return tuple(joined)
