"""Experts that ranks share: who is to hold which, and what was counted, in the wire's form."""

import json
import os

import torch

from nodeserve.config import WorkerSpec
from nodeserve.model.expert_parts import Spread
from nodeserve.model.spread_experts import SpreadExperts
from nodeserve.policy.expert_placement import place
from nodeserve.shards import Shard
from nodeserve.wire.numbers import pack_counts, pack_ids
from nodeserve.worker.contract import NO_ROWS, ExpertRows


def spreads_of(spec: WorkerSpec, shard: Shard) -> dict[int, Spread]:
    """The experts of each rank in our layers, by the counts that all ranks of the instance were
    given; nothing where there are none. Each rank finds the same."""
    if spec.experts_fd < 0 or spec.ep == 1:
        return {}
    num_bytes = os.fstat(spec.experts_fd).st_size
    loads = json.loads(os.pread(spec.experts_fd, num_bytes, 0))  # the offset is everybody's
    return {
        layer: place(loads[layer], spec.ep, spec.redundant_experts)
        for layer in filter(shard.whole.is_sparse, shard.layers)
    }


def told(experts: SpreadExperts | None) -> ExpertRows:
    """What was counted so far."""
    if experts is None:
        return NO_ROWS
    rows = experts.rows()
    return ExpertRows(pack_ids(rows.layers.tolist()), _packed(rows.experts), _packed(rows.ranks))


def _packed(rows: torch.Tensor) -> bytes:
    return pack_counts(rows.flatten().tolist())
