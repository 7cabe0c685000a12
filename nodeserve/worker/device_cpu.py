"""The CPU device: native kernels, pages in shared memory, handoff by copying blocks."""

import os
from functools import partial
from typing import Any

import torch

from nodeserve import checkpoint
from nodeserve.config import ModelConfig, WorkerSpec
from nodeserve.model import backend, kv, parallel
from nodeserve.model.families import Model
from nodeserve.model.loader import open_stored
from nodeserve.model.ops import Ops
from nodeserve.model.ops_cpu import CpuCache, CpuOps
from nodeserve.policy.blocks import blocks_for
from nodeserve.policy.chunks import attention_weight
from nodeserve.shards import Place, Shard
from nodeserve.worker.constraints import Constraints
from nodeserve.worker.contract import Device, Progress, Team, forget_nothing
from nodeserve.worker.executor import ModelExecutor, ModelFollower
from nodeserve.worker.experts import spreads_of, told
from nodeserve.worker.handoff import SHARED_MEMORY, HostTransfer
from nodeserve.worker.inputs import Staging
from nodeserve.worker.meeting import meet, place_of
from nodeserve.worker.page_shard import page_shard
from nodeserve.worker.pages import make_pool, num_blocks_in
from nodeserve.worker.ranks import ranks_of


def load(spec: WorkerSpec, progress: Progress, team: Team) -> Device:
    dtype = kv.dtype_named(spec.dtype)
    found = checkpoint.resolve(spec.model, spec.load_format, spec.model_impl)
    constraints = Constraints.of_worker(spec, found.config)
    max_blocks = blocks_for(spec.max_model_len, spec.block_size)
    torch.set_num_threads(spec.num_threads)
    torch.set_num_interop_threads(1)
    progress("device", 0, 1)
    place = place_of(spec)
    shard = Shard(found.config, place)
    ops = _make_ops(spec, shard.config, dtype)
    progress("device", 1, 1)
    layout = kv.layout_of(found.config, spec.block_size, dtype, shard)
    assert spec.kv_memory is not None, "resolved for CPU workers"
    num_blocks = num_blocks_in(spec.kv_memory, layout.block_bytes, max_blocks)
    progress("pages", 0, 1)
    pool = make_pool(spec.pages_fd, num_blocks * layout.block_bytes)
    progress("pages", 1, 1)
    progress("instance", 0, 1)
    groups = meet(spec, ops.device, found.config.hidden_size).groups
    progress("instance", 1, 1)
    weights = open_stored(found, dtype, spec.load_format)
    experts = parallel.spread_experts(shard, ops, groups, spreads_of(spec, shard))
    model = parallel.build(shard, weights, ops, groups, partial(progress, "weights"), experts)
    if found.config.mla is not None:
        torch.set_num_threads(1)  # model/mla_cpu.py says why
    cache = ops.cache(layout, pool)
    staging = Staging(spec.max_num_batched_tokens, spec.max_num_seqs, max_blocks)
    executor = ModelExecutor(model, cache, staging, constraints, team, spec.pp, ranks_of(spec))
    if len(spec.cpus) > 1:
        os.sched_setaffinity(0, spec.cpus[:1])  # the kernels' other threads have the other cores
    progress("warm-up", 0, 1)
    num_common = team.least_blocks(num_blocks)
    if spec.leads:
        executor.warm_up()
    forget_rows = forget_nothing if experts is None else experts.forget
    forget_rows()
    progress("warm-up", 1, 1)
    return Device(
        executor=executor,
        transfer=HostTransfer(pool, layout.block_bytes),
        num_blocks=num_common,
        block_bytes=layout.block_bytes,
        pages=page_shard(found.config, layout, isinstance(cache, CpuCache)),
        pages_bytes=num_blocks * layout.block_bytes,
        pages_handle=b"",
        num_threads=spec.num_threads,
        kernels=describe(ops),
        handoff=SHARED_MEMORY,
        eos_token_ids=frozenset(found.config.eos_token_ids),
        following=None if spec.leads else _follower(model, cache, place),
        num_stages=spec.pp,
        attention_weight=attention_weight(found.config) if spec.pp > 1 else 0.0,
        expert_rows=partial(told, experts),
        forget_rows=forget_rows,
    )


def _make_ops(spec: WorkerSpec, config: ModelConfig, dtype: torch.dtype) -> Ops:
    return backend.make_ops(
        config,
        dtype,
        block_size=spec.block_size,
        num_threads=spec.num_threads,
        cpus=spec.cpus,
    )


def _follower(model: Model, cache: Any, place: Place) -> ModelFollower:
    return ModelFollower(model, cache, place.pp, place.is_last and place.tp_rank == 0)


def describe(ops: Ops) -> str:
    return f"native {ops.engine.isa}" if isinstance(ops, CpuOps) else "torch"
