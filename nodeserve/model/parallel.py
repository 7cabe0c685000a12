"""One worker's part of a model that several share: its weights, operations and stage.

    shard = Shard(config, place)
    ops = make_ops(shard.config, dtype)
    layout = kv.layout_of(config, block_size, dtype, shard)
    model = parallel.build(shard, open_weights(checkpoint, dtype), ops, groups)

A family's code is written for one worker and runs here as it is: `ShardWeights` gives it the rows
and columns that are ours, `Shard.config` their counts, and `ShardOps` sums or gathers where the
ranks' results meet: behind the products that end in the residual stream, behind the embedding, and
at the leader behind the head.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch

from nodeserve.config import ModelConfig, MoeConfig
from nodeserve.model import families
from nodeserve.model.decoder import Progress, Stage
from nodeserve.model.expert_parts import Mlp, Router, Shared, Spread
from nodeserve.model.group import Groups
from nodeserve.model.loader import StoredSource
from nodeserve.model.ops import AddNorm, Attention, MlaAttention, Op, Ops
from nodeserve.model.part import Part
from nodeserve.model.quantised import Weight, padded
from nodeserve.model.spread_experts import SpreadExperts
from nodeserve.model.workspace import Scratch
from nodeserve.shards import Axis, Shard, check_fits


class ShardWeights:
    """A file's tensors by name, as far as they are ours."""

    def __init__(self, source: StoredSource, shard: Shard) -> None:
        self._source = source
        self._shard = shard
        self._cuts = families.cuts_of(shard.whole)

    def __call__(self, name: str) -> Weight:
        """Rows beyond the end of the vocabulary are zeros, so that all ranks have equally many."""
        cut = self._cuts.get(name.split(".")[-2])
        if cut is None or self._shard.place.tp == 1:
            return self._source(name)
        found = self._source(name, Part(cut.dim, lambda size: self._shard.span(cut, size)))
        return padded(found, self._shard.vocab_rows) if cut.axis is Axis.VOCAB else found


class ShardOps:
    """What a backend makes, summed and gathered over tensor ranks where their results meet.

    All that needs nothing of others is the backend's own.
    """

    def __init__(
        self, ops: Ops, shard: Shard, groups: Groups, experts: SpreadExperts | None
    ) -> None:
        self._ops = ops
        self._shard = shard
        self._experts = experts
        self._group = groups.tp
        self._first = shard.layers.start
        self._reduce = groups.tp.all_reduce if groups.tp.size > 1 else None
        self._parts = Scratch(ops.device, torch.float32)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def reserve(self, max_tokens: int, max_seqs: int, max_context_len: int) -> None:
        self._ops.reserve(max_tokens, max_seqs, max_context_len)
        self._parts.reserve(max_seqs)

    def embedding(self, table: Weight) -> Op:
        """Each rank looks up the words that it has, the others add zeros."""
        if self._group.size == 1:
            return self._ops.embedding(table)
        lookup, vocab, group = self._ops.embedding(table), self._shard.vocab, self._group
        last = table.shape[0] - 1

        def op(x: torch.Tensor, out: torch.Tensor) -> None:
            rows = x - vocab.start
            elsewhere = (rows < 0) | (rows >= len(vocab))
            lookup(rows.clamp_(0, last), out)
            out.masked_fill_(elsewhere.unsqueeze(1), 0.0)
            group.all_reduce(out)

        return op

    def head(self, weight: Weight) -> Op:
        """The leader gets the logits of all, the others give them."""
        if self._group.size == 1:
            return self._ops.head(weight)
        product, group, scratch = self._ops.head(weight), self._group, self._parts
        width = weight.shape[0]
        scratch.need((group.size + 1) * width)

        def op(x: torch.Tensor, out: torch.Tensor) -> None:
            num_rows = x.size(0)
            whole = scratch.rows(num_rows, (group.size + 1) * width).view(-1, num_rows, width)
            product(x, whole[0])
            if group.rank:
                group.gather(whole[0], None)
                return
            group.gather(whole[0], whole[1:])
            for rank, part in enumerate(whole[1:]):
                place = out[:, rank * width : (rank + 1) * width]
                place.copy_(part[:, : place.size(1)])

        return op

    def linear_add_norm(self, weight: Weight, norm_weight: torch.Tensor, eps: float) -> AddNorm:
        return self._ops.linear_add_norm(weight, norm_weight, eps, reduce=self._reduce)

    def linear_add(self, weight: Weight, bias: torch.Tensor | None = None) -> Op:
        return self._ops.linear_add(weight, bias, reduce=self._reduce)

    def add_norm(self, norm_weight: torch.Tensor, eps: float) -> AddNorm:
        """What experts of which each rank has some columns leave is a sum too."""
        return self._ops.add_norm(norm_weight, eps, reduce=self._reduce)

    def experts(
        self,
        moe: MoeConfig,
        layer: int,
        router: Router,
        expert: Callable[[int], Mlp],
        shared: Shared | None = None,
    ) -> Op:
        """Whole experts are spread over the ranks that share them."""
        exchange = None if self._experts is None else self._experts.exchange(layer)
        return self._ops.experts(moe, layer, router, expert, shared, exchange=exchange)

    def attention(
        self,
        config: ModelConfig,
        layer: int,
        tables: tuple[torch.Tensor, torch.Tensor],
        qk_norms: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> Attention:
        """`layer` counts in the whole model; the pages have those of our stage."""
        here = replace(config, first_window_layer=max(0, config.first_window_layer - self._first))
        return self._ops.attention(here, layer - self._first, tables, qk_norms)

    def mla_attention(
        self,
        config: ModelConfig,
        layer: int,
        tables: tuple[torch.Tensor, torch.Tensor],
        kv_norm: torch.Tensor,
        kv_up: Weight,
    ) -> MlaAttention:
        return self._ops.mla_attention(config, layer - self._first, tables, kv_norm, kv_up)


def stage_of(shard: Shard, groups: Groups) -> Stage:
    place, whole = shard.place, shard.whole
    num_logits = whole.vocab_size if place.is_leader else 0
    return Stage(shard.layers, whole.num_layers, num_logits, groups.pipe, place.ep > 1)


def spread_experts(
    shard: Shard, ops: Ops, groups: Groups, held: Mapping[int, Spread] | None = None
) -> SpreadExperts | None:
    """None where ranks share none."""
    if shard.whole.moe is None or groups.ep.size == 1:
        return None
    return SpreadExperts(groups.ep, shard.whole.moe.num_experts, ops.device, held)


def build(
    shard: Shard,
    source: StoredSource,
    ops: Ops,
    groups: Groups,
    progress: Progress | None = None,
    experts: SpreadExperts | None = None,
) -> families.Model:
    """Bind our part of a file's weights to `ops`, which are made for `shard.config`; `experts`:
    who holds which of those that ranks share, if not each as many.

    ModelError for a model of fewer heads or layers than the instance has ranks or stages.
    """
    check_fits(shard.whole, shard.place.shape)
    if experts is None:
        experts = spread_experts(shard, ops, groups)
    shared = cast(Ops, ShardOps(ops, shard, groups, experts))
    weights = ShardWeights(source, shard)
    return families.build(shard.config, weights, shared, progress, stage_of(shard, groups))
