"""How close attention over pages is to what the GPU can do.

    python -m bench.gpu.attention [--smoke]

Ceilings first: a device-to-device copy (bytes read and written), and a square bf16 product of
random matrices. Then attention of Llama-3.1-8B's shape over random pages, each kernel that is here:

    decode   bytes of K and V that are visible, once, against the copy bandwidth
    prefill  multiplications and additions of the visible pairs, against the product's rate

A run goes through the layers of a pool that is larger than the cache, and through a CUDA graph
where that is possible, so that launches do not count. Times are medians.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from bench.gpu.measure import graphed, median_s
from bench.report import emit
from nodeserve.model.gpu.attention import choice, probe
from nodeserve.model.gpu.attention.case import step_of
from nodeserve.model.gpu.attention.choice import Kind, Phase
from nodeserve.model.gpu.attention.paged import PagedAttention
from nodeserve.model.gpu.attention.parts import Heads
from nodeserve.model.gpu.step import GpuStep

LLAMA_8B = Heads(num_heads=32, num_kv_heads=8, head_dim=128, block_size=16, dtype=torch.bfloat16)
ALL = frozenset[int | None]({None})
COPY_BYTES = 2 << 30
PRODUCT_SIZE = 8192
POOL_BYTES = 1 << 30  # several times the cache, at the least
MAX_LAYERS = 32


@dataclass(frozen=True, slots=True)
class Steps:
    """What is measured, of which attention."""

    heads: Heads
    decodes: tuple[tuple[int, int], ...]  # sequences, context
    prefills: tuple[tuple[int, int, int], ...]  # sequences, queries, context


STEPS = Steps(
    LLAMA_8B,
    ((1, 1024), (1, 8192), (1, 32768), (8, 8192), (64, 1024), (64, 8192), (256, 1024)),
    ((1, 512, 512), (1, 2048, 2048), (1, 8192, 8192), (1, 2048, 32768), (8, 512, 512)),
)
SMOKE = Steps(LLAMA_8B, STEPS.decodes[:1], STEPS.prefills[:1])
TOY = Steps(Heads(4, 2, 16, 16, torch.float32), ((2, 20),), ((1, 20, 40),))  # for rehearsals


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device gave in this run."""

    copy_gb_s: float
    product_tflop_s: float


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel on one step."""

    phase: str
    kind: str
    num_seqs: int
    query_len: int
    context_len: int
    us: float  # a layer
    achieved: float  # GB/s of a decode, TFLOP/s of a prefill
    share: float  # of the ceiling

    def __str__(self) -> str:
        shape = f"{self.num_seqs:>4} x {self.query_len:>5} of {self.context_len:>6}"
        unit = "GB/s" if self.phase == Phase.DECODE.value else "TFLOP/s"
        speed = f"{self.us:>9.1f} us {self.achieved:>8.1f} {unit:<7} {self.share:>5.0%}"
        return f"{self.phase:<8} {shape} {speed}  {self.kind}"


# -- the work of a step ---------------------------------------------------------------------------


def visible_bytes(heads: Heads, num_seqs: int, context_len: int) -> int:
    """Bytes of K and V in the contexts of one layer."""
    values = 2 * heads.num_kv_heads * heads.head_dim
    return num_seqs * context_len * values * heads.dtype.itemsize


def visible_flops(heads: Heads, num_seqs: int, query_len: int, context_len: int) -> int:
    """Multiplications and additions of one layer: two products over all visible pairs."""
    before = context_len - query_len
    pairs = num_seqs * (query_len * before + query_len * (query_len + 1) // 2)
    return 4 * heads.num_heads * heads.head_dim * pairs


# -- measuring ------------------------------------------------------------------------------------


def measure_ceilings(device: torch.device, repeats: int) -> Ceilings:
    source = torch.ones(COPY_BYTES // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copy_s = median_s(lambda: target.copy_(source), device, repeats)
    shape = (PRODUCT_SIZE, PRODUCT_SIZE)
    a, b = (torch.randn(shape, device=device).to(torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    product_s = median_s(lambda: torch.mm(a, b, out=product), device, repeats)
    return Ceilings(2 * COPY_BYTES / copy_s / 1e9, 2 * PRODUCT_SIZE**3 / product_s / 1e12)


@dataclass(frozen=True, slots=True)
class Work:
    """A step over all layers of a pool of random pages."""

    query: torch.Tensor  # [num_tokens, num_heads, head_dim]
    pool: torch.Tensor  # [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]
    step: GpuStep
    out: torch.Tensor  # as query

    def run(self, backend: PagedAttention) -> None:
        backend.plan(self.step)
        for layer in range(self.pool.size(1)):
            backend.attend(self.query, self.pool[:, layer], self.step, self.out, None)


def make_work(
    heads: Heads, num_seqs: int, query_len: int, context_len: int, device: torch.device
) -> Work:
    """Sequences of one length, their blocks in random order."""
    layer_bytes = visible_bytes(heads, num_seqs, context_len)
    num_layers = min(max(POOL_BYTES // layer_bytes, 1), MAX_LAYERS)
    blocks = -(-context_len // heads.block_size)
    shape = (num_layers, 2, heads.num_kv_heads, heads.block_size, heads.head_dim)
    pool = torch.empty((num_seqs * blocks, *shape), dtype=heads.dtype, device=device).normal_()
    table = torch.randperm(num_seqs * blocks, device=device).int().view(num_seqs, blocks)
    rows = (num_seqs * query_len, heads.num_heads, heads.head_dim)
    query = torch.empty(rows, dtype=heads.dtype, device=device).normal_()
    step = step_of(heads.block_size, [(query_len, context_len)] * num_seqs, table)
    return Work(query, pool, step, torch.empty_like(query))


def layer_us(work: Work, backend: PagedAttention, repeats: int) -> float:
    """Median time of one layer's attention; in a graph where a step of decodes can be in one."""
    step, device = work.step, work.pool.device

    def run() -> None:
        work.run(backend)

    backend.reserve(step.num_tokens, step.num_seqs, step.max_context_len)
    in_graph = backend.capturable and step.num_decodes == step.num_seqs
    seconds = median_s(graphed(run, device) if in_graph else run, device, repeats, warm=1)
    return 1e6 * seconds / work.pool.size(1)


def backends(
    heads: Heads, phase: Phase, device: torch.device
) -> Iterator[tuple[Kind, PagedAttention]]:
    """Every kernel for a phase that is here and right on this device, but the reference."""
    facts = probe.facts_of(heads, ALL, device)
    maker = probe.Maker(facts, device)
    for kind in choice.ORDER[phase]:
        if kind is not Kind.REFERENCE and choice.refusal(kind, facts) is None:
            part, _ = maker.trial(kind, phase)
            if part is not None:
                yield kind, PagedAttention(part, part, part.name)


def bench(
    device: torch.device, ceilings: Ceilings, steps: Steps = STEPS, *, repeats: int = 20
) -> Iterator[Row]:
    """Measure every kernel on every step."""
    heads = steps.heads
    for kind, backend in backends(heads, Phase.DECODE, device):
        for num_seqs, context in steps.decodes:
            work = make_work(heads, num_seqs, 1, context, device)
            us = layer_us(work, backend, repeats)
            gb_s = visible_bytes(heads, num_seqs, context) / us / 1e3
            share = gb_s / ceilings.copy_gb_s
            yield Row("decode", kind.value, num_seqs, 1, context, us, gb_s, share)
    for kind, backend in backends(heads, Phase.PREFILL, device):
        for num_seqs, queries, context in steps.prefills:
            work = make_work(heads, num_seqs, queries, context, device)
            us = layer_us(work, backend, repeats)
            tflop_s = visible_flops(heads, num_seqs, queries, context) / us / 1e6
            share = tflop_s / ceilings.product_tflop_s
            yield Row("prefill", kind.value, num_seqs, queries, context, us, tflop_s, share)


def main() -> None:
    parser = argparse.ArgumentParser(description="attention over pages against the GPU's limits")
    parser.add_argument("--smoke", action="store_true", help="one step of each phase")
    smoke = parser.parse_args().smoke
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu.attention needs an NVIDIA GPU: torch finds none")
    device = torch.device("cuda")
    ceilings = measure_ceilings(device, 20)
    print(f"{torch.cuda.get_device_name(device)}: {ceilings}")
    rows = []
    for row in bench(device, ceilings, SMOKE if smoke else STEPS):
        rows.append(row)
        print(row, flush=True)
    emit({"bench": "attention", "ceilings": asdict(ceilings), "rows": [asdict(r) for r in rows]})


if __name__ == "__main__":
    main()
