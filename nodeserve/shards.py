"""Which part of a model each worker of an instance has: layers, heads, columns, vocabulary.

Arithmetic on counts alone, so that whoever loads weights, keeps pages, moves them or plans layouts
shares one answer. Parts are neighbours in the order of the ranks and as even as they can be. They
need not be equal: every rank computes with its own number of heads, and only sums are shared.
"""

import enum
from dataclasses import dataclass, replace

from nodeserve.config import ModelConfig
from nodeserve.errors import ModelError
from nodeserve.layout import Shape

_INNER_UNITS = (256, 32)  # values that quantised rows keep in one block, the largest first
_VOCAB_UNIT = 64  # matrix products like round numbers


@dataclass(frozen=True, slots=True)
class Place:
    """A worker among those of its instance.

    Tensor ranks are neighbours, then pipeline stages, then the ranks that share experts.
    """

    tp_rank: int = 0
    tp: int = 1
    pp_rank: int = 0
    pp: int = 1
    ep_rank: int = 0
    ep: int = 1

    @staticmethod
    def of(shape: Shape, rank: int) -> "Place":
        """The place of worker `rank`, from 0 to shape.num_workers - 1."""
        rest, tp_rank = divmod(rank, shape.tp)
        ep_rank, pp_rank = divmod(rest, shape.pp)
        assert 0 <= ep_rank < shape.ep, f"rank {rank} of {shape}"
        return Place(tp_rank, shape.tp, pp_rank, shape.pp, ep_rank, shape.ep)

    @property
    def shape(self) -> Shape:
        return Shape(self.tp, self.pp, self.ep)

    @property
    def rank(self) -> int:
        return (self.ep_rank * self.pp + self.pp_rank) * self.tp + self.tp_rank

    @property
    def is_first(self) -> bool:
        """Whether this stage has the embedding and the head."""
        return self.pp_rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage has the last layer and the norm behind it."""
        return self.pp_rank == self.pp - 1

    @property
    def is_leader(self) -> bool:
        """Whether requests are queued here, and tokens chosen."""
        return self.pp_rank == self.tp_rank == 0


class Axis(enum.Enum):
    """What a dimension of a matrix is made of."""

    HEADS = enum.auto()
    KV_HEADS = enum.auto()
    INNER = enum.auto()  # the width of an MLP or expert
    VOCAB = enum.auto()


@dataclass(frozen=True, slots=True)
class Cut:
    """The dimension of a tensor that tensor ranks share."""

    dim: int
    axis: Axis


Cuts = dict[str, Cut]
"""How a family's tensors are cut, by the last part of a name before ".weight" or ".bias"."""


def share(total: int, num_parts: int, index: int) -> range:
    """Part `index` of 0 .. total; where they cannot be equal, later ones have one more."""
    return range(index * total // num_parts, (index + 1) * total // num_parts)


def kv_head_range(num_kv_heads: int, tp_rank: int, tp: int) -> range:
    """The KV heads of a tensor rank. Of more ranks than heads, neighbours hold the same head."""
    if tp <= num_kv_heads:
        return share(num_kv_heads, tp, tp_rank)
    head = tp_rank * num_kv_heads // tp
    return range(head, head + 1)


def inner_range(size: int, tp_rank: int, tp: int) -> range:
    """Columns of an MLP of `size` for a tensor rank, cut between a file's blocks where possible."""
    even = [unit for unit in _INNER_UNITS if size % (unit * tp) == 0]
    unit = even[0] if even else _INNER_UNITS[-1] if size >= _INNER_UNITS[-1] * tp else 1
    units = share(-(-size // unit), tp, tp_rank)
    return range(units.start * unit, min(units.stop * unit, size))


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a model that one worker has. All ranges count in the whole model."""

    whole: ModelConfig
    place: Place = Place()

    @property
    def layers(self) -> range:
        return share(self.whole.num_layers, self.place.pp, self.place.pp_rank)

    @property
    def kv_heads(self) -> range:
        return kv_head_range(self.whole.num_kv_heads, self.place.tp_rank, self.place.tp)

    @property
    def heads(self) -> range:
        """Those of our KV heads; of one KV head on several ranks, a part."""
        tp, num_kv_heads = self.place.tp, self.whole.num_kv_heads
        group, kv = self.whole.num_heads // num_kv_heads, self.kv_heads
        if tp <= num_kv_heads:
            return range(kv.start * group, kv.stop * group)
        # First ranks of this KV head and of the next.
        first, end = (-(-head * tp // num_kv_heads) for head in (kv.start, kv.stop))
        part = share(group, end - first, self.place.tp_rank - first)
        return range(kv.start * group + part.start, kv.start * group + part.stop)

    @property
    def vocab_rows(self) -> int:
        """Rows of every rank's embedding and head; at the end of the vocabulary some are empty."""
        if self.place.tp == 1:
            return self.whole.vocab_size
        unit = _VOCAB_UNIT * self.place.tp
        return -(-self.whole.vocab_size // unit) * _VOCAB_UNIT

    @property
    def vocab(self) -> range:
        first, end = (
            rank * self.vocab_rows for rank in (self.place.tp_rank, self.place.tp_rank + 1)
        )
        return range(min(first, self.whole.vocab_size), min(end, self.whole.vocab_size))

    def inner(self, size: int) -> range:
        return inner_range(size, self.place.tp_rank, self.place.tp)

    @property
    def config(self) -> ModelConfig:
        """What this rank's attention and MLP look like. Layers and vocabulary stay the model's."""
        return replace(
            self.whole,
            num_heads=len(self.heads),
            num_kv_heads=len(self.kv_heads),
            intermediate_size=len(self.inner(self.whole.intermediate_size)),
        )

    def span(self, cut: Cut, size: int) -> range:
        """Our part of a dimension of `size` that `cut` describes."""
        match cut.axis:
            case Axis.HEADS:
                return _scaled(self.heads, size // self.whole.num_heads)
            case Axis.KV_HEADS:
                return _scaled(self.kv_heads, size // self.whole.num_kv_heads)
            case Axis.INNER:
                return self.inner(size)
            case Axis.VOCAB:
                return self.vocab


def _scaled(units: range, width: int) -> range:
    return range(units.start * width, units.stop * width)


def _narrowest(config: ModelConfig) -> int:
    """The width of the narrowest MLP or expert of any layer."""
    moe = config.moe
    if moe is None:
        return config.intermediate_size
    widths = [moe.intermediate_size]
    if moe.shared_intermediate_size:
        widths.append(moe.shared_intermediate_size)
    if moe.dense_layers:
        widths.append(config.intermediate_size)
    return min(widths)


def check_fits(config: ModelConfig, shape: Shape) -> None:
    """ModelError says which degrees a model admits, if these are too many."""
    if config.foreign is not None and shape.num_workers > 1:
        raise ModelError(
            f"{config.foreign.model_type} runs as transformers' code, on one worker an instance:"
            f" use instances of one worker, not {shape}"
        )
    for name, degree, limit, what in (
        ("tp", shape.tp, config.num_heads, "attention heads"),
        ("tp", shape.tp, _narrowest(config), "columns in its narrowest MLP"),
        ("pp", shape.pp, config.num_layers, "layers"),
    ):
        if degree > limit:
            raise ModelError(
                f"{name}{degree} does not fit a model of {limit} {what}: use {name}{limit} or less"
            )
    any_sparse = config.moe and any(map(config.is_sparse, range(config.num_layers)))
    num_experts = config.moe.num_experts if config.moe and any_sparse else 0
    if 1 < shape.ep > num_experts:
        raise ModelError(
            f"ep{shape.ep} shares a layer's experts, of which this model has {num_experts}: use "
            + (f"ep{num_experts} or less" if num_experts else "tp, or instances of one worker")
        )
