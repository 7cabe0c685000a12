"""The CUDA device: weights, kernels, graphs and pages on one GPU, handoff from GPU to GPU.

In this order, as each needs what came before: weights, buffers of the largest step, a warm-up that
shows what a step really takes, pages from what is left, graphs over those pages.
"""

from functools import partial

import torch

from nodeserve import checkpoint
from nodeserve.config import WorkerSpec
from nodeserve.model import families, kv, parallel
from nodeserve.model.loader import open_weights
from nodeserve.model.spread_experts import SpreadExperts
from nodeserve.policy.blocks import blocks_for
from nodeserve.policy.chunks import attention_weight
from nodeserve.shards import Shard
from nodeserve.worker.contract import Device, ExpertRows, Progress, Team
from nodeserve.worker.executor_cuda import CudaExecutor, Together
from nodeserve.worker.experts import spreads_of, told
from nodeserve.worker.gpu_model import GpuParts, MakeParts, make_parts
from nodeserve.worker.gpu_runtime import CudaRuntime, Runtime
from nodeserve.worker.meeting import Meeting, meet, place_of
from nodeserve.worker.page_shard import page_shard
from nodeserve.worker.ranks import ranks_of
from nodeserve.worker.sizing import Wanted, graph_sizes, num_blocks_for
from nodeserve.worker.staging_cuda import CudaStaging
from nodeserve.worker.transfer_setup import make_transfer
from nodeserve.worker.upload import Uploader


def load(
    spec: WorkerSpec,
    progress: Progress,
    team: Team,
    runtime: Runtime | None = None,
    parts_of: MakeParts = make_parts,
) -> Device:
    """A warm GPU worker. Tests bring another runtime, and may bring slower parts."""
    progress("device", 0, 1)
    dtype = kv.dtype_named(spec.dtype)
    torch.set_num_threads(spec.num_threads)  # they fill the buffers that weights go through
    runtime = CudaRuntime() if runtime is None else runtime
    found = checkpoint.resolve(spec.model, spec.load_format, spec.model_impl)
    shard = Shard(found.config, place_of(spec))
    parts = parts_of(spec, shard.config, dtype, runtime)
    progress("device", 1, 1)
    progress("instance", 0, 1)
    meeting = meet(spec, runtime.device, found.config.hidden_size)
    progress("instance", 1, 1)
    experts = parallel.spread_experts(shard, parts.ops, meeting.groups, spreads_of(spec, shard))
    model = _load_model(spec, found, shard, meeting, parts, runtime, progress, experts)
    torch.set_num_threads(1)  # the step loop's own tensors are small

    layout = kv.layout_of(found.config, spec.block_size, dtype, shard)
    executor = _make_executor(spec, model, parts, runtime, _together(spec, meeting))
    sizes = _sizes(spec) if parts.capturable and not meeting.groups.by_host else ()
    progress("warm-up", 0, 1)
    wanted = _wanted(spec, layout.block_bytes, len(sizes))
    _measure(spec, executor, parts, layout, runtime, found.config.vocab_size)
    num_blocks = meeting.least("blocks", num_blocks_for(runtime.memory(), wanted))
    progress("warm-up", 1, 1)

    progress("pages", 0, 1)
    pool = runtime.cuda.Pool(runtime.index, (num_blocks + 1) * layout.block_bytes)
    executor.use(parts.ops.cache(layout, runtime.view(pool)), spare_block=num_blocks)
    transfer, route = make_transfer(spec, runtime, pool, layout.block_bytes, meeting.least)
    progress("pages", 1, 1)
    executor.capture(sizes, partial(progress, "graphs"), meeting.least)
    if experts is not None:
        runtime.submit(experts.forget)
    executor.team = team
    return Device(
        executor=executor,
        transfer=transfer,
        num_blocks=team.least_blocks(num_blocks),
        block_bytes=layout.block_bytes,
        pages=page_shard(found.config, layout),
        pages_bytes=transfer.pages_bytes,
        pages_handle=transfer.pages_handle,
        num_threads=spec.num_threads,
        kernels=_describe(spec, parts, executor),
        handoff=route.description,
        eos_token_ids=frozenset(found.config.eos_token_ids),
        following=None if spec.leads else executor,
        num_stages=spec.pp,
        attention_weight=attention_weight(found.config) if spec.pp > 1 else 0.0,
        expert_rows=partial(expert_rows_of, runtime, experts),
    )


def expert_rows_of(runtime: Runtime, experts: SpreadExperts | None) -> ExpertRows:
    """What was counted in all steps that were launched; waits for them."""
    found: list[ExpertRows] = []
    runtime.submit(lambda: found.append(told(experts))).synchronize()
    return found[0]


def _together(spec: WorkerSpec, meeting: Meeting) -> Together:
    """With several stages nobody needs the leader's tokens: a sequence's next step is launched when
    they are known."""
    reduce, place = meeting.groups.tp.all_reduce, meeting.place

    def share(tokens: torch.Tensor) -> None:
        values = tokens.float()  # what groups sum; ids are far below 2^24, so none is rounded
        reduce(values)
        tokens.copy_(values)

    return Together(
        spec.leads,
        share if spec.tp > 1 and spec.pp == 1 else _keep,
        ranks_of(spec),
        spec.pp,
        has_results=spec.pp > 1 and place.is_last and place.tp_rank == 0,
    )


def _keep(tokens: torch.Tensor) -> None:
    """Nobody else needs them."""


def _load_model(
    spec: WorkerSpec,
    found: checkpoint.Checkpoint,
    shard: Shard,
    meeting: Meeting,
    parts: GpuParts,
    runtime: Runtime,
    progress: Progress,
    experts: SpreadExperts | None,
) -> families.Model:
    upload = Uploader(runtime)
    weights = open_weights(found, kv.dtype_named(spec.dtype), spec.load_format, upload)
    tell = partial(progress, "weights")
    model = parallel.build(shard, weights, parts.ops, meeting.groups, tell, experts)
    upload.close()
    model.reserve(
        spec.max_num_batched_tokens, spec.max_num_seqs, spec.max_num_seqs, spec.max_model_len
    )
    return model


def _make_executor(
    spec: WorkerSpec,
    model: families.Model,
    parts: GpuParts,
    runtime: Runtime,
    together: Together,
) -> CudaExecutor:
    staging = CudaStaging(
        runtime,
        max_tokens=spec.max_num_batched_tokens,
        max_seqs=spec.max_num_seqs,
        max_context_len=spec.max_model_len,
        max_blocks=blocks_for(spec.max_model_len, spec.block_size),
        num_steps=max(spec.pp, 2),
    )
    return CudaExecutor(runtime, model, staging, parts.sampler, parts.feed_tokens, together)


def _sizes(spec: WorkerSpec) -> tuple[int, ...]:
    """Steps to capture: none where nothing decodes, or where counts that a step goes by are read on
    the host, as for experts elsewhere, or it waits for other stages."""
    if spec.enforce_eager or spec.role == "prefill" or spec.ep > 1 or spec.pp > 1:
        return ()
    return graph_sizes(spec.max_num_seqs)


def _wanted(spec: WorkerSpec, block_bytes: int, num_graphs: int) -> Wanted:
    return Wanted(
        block_bytes=block_bytes,
        least_blocks=blocks_for(spec.max_model_len, spec.block_size),
        block_size=spec.block_size,
        num_graphs=num_graphs,
        share=spec.gpu_share,
        utilization=spec.gpu_memory_utilization,
        kv_memory=spec.kv_memory,
    )


def _measure(
    spec: WorkerSpec,
    executor: CudaExecutor,
    parts: GpuParts,
    layout: kv.KvLayout,
    runtime: Runtime,
    vocab_size: int,
) -> None:
    """Run the largest steps in a pool of one block, which goes again."""
    runtime.trim()
    pages = torch.zeros(layout.block_bytes, dtype=torch.uint8, device=runtime.device)
    executor.use(parts.ops.cache(layout, pages), spare_block=0)
    executor.warm_up(
        spec.max_num_batched_tokens,
        spec.max_num_seqs,
        spec.max_model_len,
        spec.block_size,
        vocab_size,
    )


def _describe(spec: WorkerSpec, parts: GpuParts, executor: CudaExecutor) -> str:
    if spec.role == "prefill":
        return parts.description
    if not executor.graph_sizes:
        return f"{parts.description}, no CUDA graphs"
    return f"{parts.description}, CUDA graphs to {executor.graph_sizes[-1]}"
