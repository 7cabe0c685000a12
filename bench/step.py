"""How close a model step on this CPU is to what the machine can do.

    python -m bench.step [--smoke]

Ceilings first: read bandwidth (256 MB, every byte once) and GEMM rate (the better of oneDNN's
packed linear and ours on the model's own shapes). Then steps of a decoder with SmolLM2-135M's shape
and random weights, as shares of two floors:

    bytes   weights and visible KV read once, at the read bandwidth
    compute the step's multiplications and additions, at the GEMM rate

Decode is quoted against the bytes, prefill against the compute; the larger of both is the physical
limit. Times are the best of several repeats (the machine is shared), per thread count and dtype.
Python's share is the time of a step outside native calls.

Some steps are measured again on two tensor ranks (bench/tensor_ranks.py).

Decodes of few rows are also measured with the weights of a GGUF file, 4 bits in the layers (Q4_1)
and 8 in the head (Q8_0): the bytes are those that a step really reads, and `to_dense` is its time
over that of the same step from dense weights.

Last, what a step costs more when two workers compute it: its plan and its collectives.
"""

import argparse
import mmap
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch.nn import functional

from bench import team_step, tensor_ranks
from bench.floors import causal_pairs, linear_shapes, step_bytes, step_flops
from bench.random_weights import dense_weights, quantised_bytes, quantised_weights
from bench.report import emit
from nodeserve import _host
from nodeserve.config import ModelConfig
from nodeserve.model import families, kv, rotary
from nodeserve.model.inputs import StepInputs
from nodeserve.model.ops_cpu import DTYPE_NAMES, Arena, CpuCache, CpuOps

MODEL = ModelConfig(
    architecture="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_position=8192,
    norm_eps=1e-5,
    rope_theta=1e5,
    tie_embeddings=True,
)
BLOCK_SIZE = 16
READ_BYTES = 256 << 20
CONTEXT = 256
FEW = 4  # rows that still wait for memory


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the machine gave in this run, for one thread count and dtype."""

    read_gb_s: float
    our_gemm_gflop_s: float
    onednn_gemm_gflop_s: float

    @property
    def gemm_gflop_s(self) -> float:
        return max(self.our_gemm_gflop_s, self.onednn_gemm_gflop_s)


@dataclass(frozen=True, slots=True)
class Step:
    """One measured kind of step."""

    name: str
    dtype: str
    weights: str  # "dense", or "quantised" as in a GGUF file
    num_threads: int
    ms: float
    num_bytes: int
    gb_s: float
    tokens_per_s: float
    bytes_floor_ms: float
    compute_floor_ms: float
    share_of_bytes: float
    share_of_compute: float
    python_share: float


def best_seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


# -- ceilings -------------------------------------------------------------------------------------


def read_gb_s(engine: _host.CpuEngine, data: torch.Tensor, repeats: int) -> float:
    """The better of two readers: which one wins changes with what else the machine does."""
    address, floats = data.data_ptr(), data.view(torch.float32)
    torch.set_num_threads(engine.num_threads)
    ours = best_seconds(lambda: _host.cpu_read(engine, address, READ_BYTES), repeats)
    torchs = best_seconds(floats.sum, repeats)
    torch.set_num_threads(1)
    return READ_BYTES / min(ours, torchs) / 1e9


def our_gemm(ops: CpuOps, rows: int, repeats: int) -> float:
    rates = []
    for n, k in linear_shapes(MODEL):
        linear = ops.linear(torch.randn(n, k) * 0.03)
        x, out = torch.randn(rows, k).to(ops.act_dtype), torch.empty(rows, n)
        seconds = best_seconds(lambda op=linear, x=x, out=out: op(x, out), repeats)  # type: ignore[misc]
        rates.append(2 * rows * n * k / seconds / 1e9)
    return max(rates)


def onednn_gemm(dtype: torch.dtype, num_threads: int, rows: int, repeats: int) -> float:
    """Its packed linear where this torch has the op, else the plain one."""
    torch.set_num_threads(num_threads)
    rates = []
    for n, k in linear_shapes(MODEL):
        x, weight = torch.randn(rows, k).to(dtype), (torch.randn(n, k) * 0.03).to(dtype)
        seconds = best_seconds(lambda x=x, w=weight: functional.linear(x, w), repeats)  # type: ignore[misc]
        pack = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
        if pack is not None:
            run, packed = torch.ops.mkldnn._linear_pointwise, pack(weight, rows)
            packed_s = best_seconds(
                lambda x=x, w=packed, run=run: run(x, w, None, "none", [], ""),  # type: ignore[misc]
                repeats,
            )
            seconds = min(seconds, packed_s)
        rates.append(2 * rows * n * k / seconds / 1e9)
    torch.set_num_threads(1)
    return max(rates)


# -- steps ----------------------------------------------------------------------------------------


def inputs_of(num_seqs: int, num_new: int, context: int) -> StepInputs:
    """`num_seqs` sequences, each with its last `num_new` tokens of `context` in this step."""

    def int32(values: range) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    width = -(-context // BLOCK_SIZE)
    ends = range(num_new, num_new * num_seqs + 1, num_new)
    return StepInputs(
        token_ids=torch.randint(MODEL.vocab_size, (num_seqs * num_new,), dtype=torch.int32),
        positions=int32(range(context - num_new, context)).repeat(num_seqs),
        query_starts=int32(range(0, num_new * num_seqs + 1, num_new)),
        context_lens=torch.full((num_seqs,), context, dtype=torch.int32),
        block_table=int32(range(num_seqs * width)).view(num_seqs, width),
        logit_rows=int32(ends) - 1,
        num_decodes=num_seqs if num_new == 1 else 0,
        max_query_len=num_new,
        max_context_len=context,
    )


def make_cache(ops: CpuOps, num_tokens: int) -> CpuCache:
    """Pages in shared memory, filled with numbers: untouched pages would read as one zero page."""
    layout = kv.layout_of(MODEL, BLOCK_SIZE, ops.dtype)
    pool = mmap.mmap(-1, num_tokens // BLOCK_SIZE * layout.block_bytes)
    torch.frombuffer(pool, dtype=ops.dtype).normal_()
    cache = ops.cache(layout, pool)
    assert isinstance(cache, CpuCache)
    return cache


class Bench:
    """One dtype on one thread count."""

    def __init__(self, dtype: torch.dtype, cpus: list[int], repeats: int, smoke: bool) -> None:
        self.ops = CpuOps(MODEL, dtype, len(cpus), cpus)
        self.repeats = repeats
        self.smoke = smoke
        self.dtype = str(dtype).removeprefix("torch.")
        self.where = f"{self.dtype:8}  {len(cpus)} thread{'s' if len(cpus) > 1 else ' '}"

    def ceilings(self, data: torch.Tensor) -> Ceilings:
        rows = 128 if self.smoke else 512
        engine = self.ops.engine
        found = Ceilings(
            read_gb_s(engine, data, self.repeats),
            our_gemm(self.ops, rows, self.repeats),
            onednn_gemm(self.ops.dtype, engine.num_threads, rows, self.repeats),
        )
        print(
            f"{self.where}  read {found.read_gb_s:5.1f} GB/s   GEMM ours "
            f"{found.our_gemm_gflop_s:5.0f}, oneDNN {found.onednn_gemm_gflop_s:5.0f} GFLOP/s"
        )
        return found

    def steps(self, ceilings: Ceilings) -> list[Step]:
        model = families.build(MODEL, partial(dense_weights, MODEL), self.ops)
        cache = make_cache(self.ops, 32 * CONTEXT)
        batches = (1, FEW, 16) if self.smoke else (1, FEW, 8, 16, 32)
        prompts = (128,) if self.smoke else (128, 512, 1024)
        kinds = [(f"decode {n} x {CONTEXT}", n, 1, CONTEXT) for n in batches]
        kinds += [(f"prefill {n}", 1, n, n) for n in prompts]
        return [self.step(model, cache, ceilings, "dense", *kind) for kind in kinds]

    def quantised_steps(self, ceilings: Ceilings) -> list[Step]:
        """Decodes of few enough rows that the kernels read quantised weights."""
        most = self.ops.engine.quantised_rows(DTYPE_NAMES[self.ops.dtype])
        if most == 0:
            return []
        model = families.build(
            MODEL, partial(quantised_weights, MODEL, dtype=self.ops.dtype), self.ops
        )
        cache = make_cache(self.ops, FEW * CONTEXT)
        kinds = [(f"decode {n} x {CONTEXT}", n, 1, CONTEXT) for n in (1, FEW) if n <= most]
        return [self.step(model, cache, ceilings, "quantised", *kind) for kind in kinds]

    def step(
        self,
        model: families.Model,
        cache: CpuCache,
        ceilings: Ceilings,
        weights: str,
        name: str,
        num_seqs: int,
        num_new: int,
        context: int,
    ) -> Step:
        inputs, engine = inputs_of(num_seqs, num_new, context), self.ops.engine
        model.forward(inputs, cache)
        best, python = float("inf"), 0.0
        for _ in range(self.repeats):
            busy, start = engine.busy_seconds, time.perf_counter()
            model.forward(inputs, cache)
            seconds = time.perf_counter() - start
            if seconds < best:
                best, python = seconds, 1 - (engine.busy_seconds - busy) / seconds
        pairs = num_seqs * causal_pairs(num_new, context)
        flops = step_flops(MODEL, num_seqs * num_new, num_seqs, pairs)
        few = quantised_bytes(MODEL) if weights == "quantised" else None
        num_bytes = step_bytes(MODEL, self.ops.dtype.itemsize, num_seqs * context, few)
        by_bytes = num_bytes / ceilings.read_gb_s / 1e9
        by_flops = flops / ceilings.gemm_gflop_s / 1e9
        print(
            f"{self.where}  {name:15} {weights:9} {1e3 * best:7.2f} ms  "
            f"{num_seqs * num_new / best:7.0f} tok/s  {num_bytes / best / 1e9:4.1f} GB/s"
            f"   bytes floor {1e3 * by_bytes:6.2f} ms ({by_bytes / best:4.0%})"
            f"   compute floor {1e3 * by_flops:7.2f} ms ({by_flops / best:4.0%})"
            f"   larger {max(by_bytes, by_flops) / best:4.0%}   Python {python:.1%}"
        )
        return Step(
            name,
            self.dtype,
            weights,
            engine.num_threads,
            1e3 * best,
            num_bytes,
            num_bytes / best / 1e9,
            num_seqs * num_new / best,
            1e3 * by_bytes,
            1e3 * by_flops,
            by_bytes / best,
            by_flops / best,
            python,
        )

    def attention(self, ceilings: Ceilings, num_seqs: int) -> dict[str, float]:
        """Decode attention alone, every layer's pages in turn."""
        tables, cache = rotary.tables(MODEL), make_cache(self.ops, num_seqs * CONTEXT)
        layers = [self.ops.attention(MODEL, n, tables, None) for n in range(MODEL.num_layers)]
        query = torch.randn(num_seqs, MODEL.num_heads * MODEL.head_dim).to(self.ops.act_dtype)
        out, step = torch.empty_like(query), self.ops.begin(inputs_of(num_seqs, 1, CONTEXT), cache)
        assert isinstance(step, _host.CpuPlan)

        def run() -> None:
            for layer in layers:
                layer.attend(step, query, out)

        seconds = best_seconds(run, self.repeats)
        itemsize = self.ops.dtype.itemsize
        rate = num_seqs * CONTEXT * MODEL.kv_bytes_per_token(itemsize) / seconds / 1e9
        layer_us = 1e6 * seconds / MODEL.num_layers
        print(
            f"{self.where}  attention {num_seqs} x {CONTEXT}: {layer_us:.0f} us per layer, "
            f"{rate:.1f} GB/s ({rate / ceilings.read_gb_s:.0%} of reading)"
        )
        return {"us_per_layer": layer_us, "gb_s": rate}


def to_dense(steps: list[Step]) -> dict[str, float]:
    """Times of quantised steps over those of the same steps from dense weights, by kind."""
    dense = {
        (step.name, step.dtype, step.num_threads): step.ms
        for step in steps
        if step.weights == "dense"
    }
    ratios = {
        f"{step.name}, {step.dtype}, {step.num_threads} threads": step.ms
        / dense[step.name, step.dtype, step.num_threads]
        for step in steps
        if step.weights == "quantised"
    }
    for name, ratio in ratios.items():
        print(f"{name}: quantised takes {ratio:.0%} of dense")
    return ratios


def on_tensor_ranks(steps: list[Step], repeats: int) -> list[dict[str, object]]:
    """Some of the steps again on two ranks of one core each."""
    one_worker = {
        step.name: step.ms
        for step in steps
        if (step.dtype, step.weights, step.num_threads) == ("bfloat16", "dense", 1)
    }
    shapes = [(1, 1, CONTEXT), (16, 1, CONTEXT), (1, 128, 128)]
    kinds = [
        (name, inputs_of(*shape), one_worker[name])
        for name, shape in zip(
            (f"decode 1 x {CONTEXT}", f"decode 16 x {CONTEXT}", "prefill 128"), shapes, strict=True
        )
    ]
    return tensor_ranks.measure(MODEL, kinds, BLOCK_SIZE, repeats)


def in_two(repeats: int) -> list[dict[str, object]]:
    """What two workers say to each other for a step that both compute (bench/team_step.py)."""
    steps = {
        "decode 1": inputs_of(1, 1, CONTEXT),
        "decode 16": inputs_of(16, 1, CONTEXT),
        "prefill 128": inputs_of(1, 128, 128),
    }
    measured = team_step.measure(MODEL, steps, repeats)
    for one in measured:
        print(
            f"{one.name} in two: its plan ({one.plan_bytes} bytes) takes the leader"
            f" {one.plan_us:.0f} us and is read after {one.arrival_us:.0f} us;"
            f" collectives {one.collectives_us:.0f} us, the plan adds {one.to_collectives:.1%}"
        )
    return [asdict(one) for one in measured]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--smoke", action="store_true", help="few, short measurements")
    smoke: bool = parser.parse_args().smoke
    torch.set_num_threads(1)
    cpus = sorted(os.sched_getaffinity(0))
    dtypes = [torch.bfloat16] if smoke else [torch.bfloat16, torch.float32]
    repeats = 3 if smoke else 9
    data = Arena().take(READ_BYTES).fill_(1)  # on huge pages, like the weights
    print(f"instruction set: {_host.cpu_isa()}")
    benches = [
        Bench(dtype, cpus[:count], repeats, smoke)
        for dtype in dtypes
        for count in ((1,) if smoke else (1, 2))
        if count <= len(cpus)
    ]
    ceilings = [bench.ceilings(data) for bench in benches]
    del data
    pairs = list(zip(benches, ceilings, strict=True))
    steps = [step for bench, limits in pairs for step in bench.steps(limits)]
    steps += [step for bench, limits in pairs for step in bench.quantised_steps(limits)]
    attention = [bench.attention(limits, 16) for bench, limits in pairs]
    results = [
        {"dtype": bench.dtype, "num_threads": bench.ops.engine.num_threads, **asdict(limits)}
        for bench, limits in pairs
    ]
    teams = in_two(3 if smoke else 200)
    emit(
        {
            "bench": "step",
            "isa": _host.cpu_isa(),
            "ceilings": results,
            "steps": [asdict(step) for step in steps],
            "to_dense": to_dense(steps),
            "attention_16x256": attention,
            "tensor_ranks": on_tensor_ranks(steps, repeats),
            "in_two": teams,
        }
    )


if __name__ == "__main__":
    main()
