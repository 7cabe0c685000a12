"""Quantised weights are their dense ones, to the bit: numbers, every kernel, a whole model."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from nodeserve import _host
from nodeserve.checkpoint import resolve
from nodeserve.config import ModelConfig
from nodeserve.gguf import TensorInfo
from nodeserve.model import backend, families, kv
from nodeserve.model.inputs import StepInputs
from nodeserve.model.loader import open_stored, open_weights
from nodeserve.model.ops_cpu import DTYPE_NAMES, CpuOps
from nodeserve.model.ops_torch import TorchOps
from nodeserve.model.quantised import Integers, Quantised, Weight, can_stay, dense, stacked
from tests.reference.blocks import KINDS, TYPES, random_blocks
from tests.reference.embedded import needs_embedded_model
from tests.reference.export import tensor_names

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
IN_EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
OF_EACH_KIND = pytest.mark.parametrize("kind", KINDS)
ON_EACH_ISA = pytest.mark.parametrize("isa", _host.cpu_isas())
ROWS = [*range(1, 14), 64]
EPILOGUES = ["store", "store_f32", "add_f32", "silu_mul"]
SHAPES = [(31, 32), (107, 64), (64, 576), (33, 1536)]  # n, k


def bits(x: torch.Tensor) -> torch.Tensor:
    """The sign of a zero counts too."""
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


def columns_of(kind: str, k: int) -> int:
    """k, or what is next to it that the type's blocks can fill."""
    size = TYPES[kind].block_size
    return -(-k // size) * size


# -- numbers --------------------------------------------------------------------------------------


def number(parts: Integers, dtype: torch.dtype) -> torch.Tensor:
    """What Integers promises, one fp32 operation after the other."""
    n, k = parts.q.shape
    q = parts.q.view(torch.int8) if parts.storage == "q8" else parts.q
    product = (q.float() - parts.zero).view(n, -1, 32) * parts.scale.unsqueeze(-1)
    exact = (q.double() - parts.zero).view(n, -1, 32) * parts.scale.double().unsqueeze(-1)
    assert torch.equal(product.double(), exact), "the product was rounded"
    if parts.low is not None:
        product = product + parts.low.unsqueeze(-1)
    return product.view(n, k).to(dtype)


@IN_EACH_DTYPE
@OF_EACH_KIND
def test_integers_and_scales_are_the_dense_numbers(kind: str, dtype: torch.dtype) -> None:
    weight = random_blocks(kind, 24, 1024, dtype)
    parts = weight.integers()
    assert parts is not None
    assert torch.equal(bits(number(parts, dtype)), bits(weight.dense()))
    if parts.storage != "q4_f32":
        halves = [parts.scale] + ([] if parts.low is None else [parts.low])
        assert all(torch.equal(part.half().float(), part) for part in halves)


@pytest.mark.parametrize("scale", [-0.5, -0.0, 0.0, torch.inf, torch.nan])
def test_eight_bits_that_no_quantiser_writes_stay_dense(scale: float) -> None:
    weight = random_blocks("Q8_0", 8, 64, torch.bfloat16)
    weight.blocks[3, :2] = torch.tensor([scale]).half().view(torch.uint8)
    assert weight.integers() is None
    ops, x = small_ops(torch.bfloat16), torch.randn(1, 64).bfloat16()
    ours, theirs = torch.empty(1, 8), torch.empty(1, 8)
    ops.linear(weight)(x, ours)
    ops.linear(weight.dense())(x, theirs)
    assert torch.equal(bits(ours), bits(theirs))


def test_rows_stack_quantised_only_if_all_are_alike() -> None:
    first, second = (random_blocks("Q4_1", 6, 64, torch.float32, seed) for seed in (1, 2))
    other = random_blocks("Q4_0", 6, 64, torch.float32)
    both = stacked([first, second])
    assert isinstance(both, Quantised) and both.shape == (12, 64)
    assert torch.equal(both.dense(), torch.cat([first.dense(), second.dense()]))
    mixed: list[Weight] = [other, first, torch.ones(1, 64)]
    for weights in (mixed, mixed[::-1], mixed[:2], mixed[1:]):
        found = stacked(weights)
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, torch.cat([dense(one) for one in weights]))


def test_what_may_stay_as_it_is_stored() -> None:
    def of(kind: str, *shape: int) -> TensorInfo:
        return TensorInfo("t", shape, TYPES[kind], 0, 0)

    assert all(can_stay(of(kind, 4, 256)) for kind in KINDS)
    assert not any(can_stay(of(kind, 4, 256)) for kind in ("Q6_K", "Q5_0", "F16", "F32"))
    assert not can_stay(of("Q8_0", 256))


# -- kernels --------------------------------------------------------------------------------------


def small_ops(dtype: torch.dtype, isa: str = "", num_threads: int = 1) -> CpuOps:
    config = ModelConfig("llama", 64, 64, 64, 1, 1, 1, 64, 64, 1e-5, 1e4)
    return CpuOps(config, dtype, num_threads, isa=isa)


class Linear:
    """One weight bound twice: with its integers and without."""

    def __init__(self, engine: _host.CpuEngine, weight: Quantised, epilogue: str) -> None:
        name, (n, k) = DTYPE_NAMES[weight.dtype], weight.shape
        act = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
        self.k, self.act = k, act
        self.width = n // 2 if epilogue == "silu_mul" else n
        self.out_dtype = torch.float32 if epilogue.endswith("f32") else act
        source, parts = weight.dense(), weight.integers()
        assert parts is not None
        self.panels = torch.zeros(
            _host.cpu_packed_bytes(name, n, k, epilogue) + 64, dtype=torch.uint8
        )
        at = self.panels.data_ptr()
        _host.cpu_pack(engine, name, source.data_ptr(), at, n, k, epilogue)
        size = _host.cpu_quantised_bytes(parts.storage, n, k, epilogue)
        self.groups = torch.zeros(size, dtype=torch.uint8)
        low = 0 if parts.low is None else parts.low.data_ptr()
        addresses = (parts.q.data_ptr(), parts.scale.data_ptr(), low, self.groups.data_ptr())
        _host.cpu_pack_quantised(engine, name, parts.storage, *addresses, n, k, epilogue)
        self.plain = _host.CpuLinear(engine, name, at, 0, n, k, epilogue)
        small = (parts.storage, self.groups.data_ptr(), parts.zero)
        self.quantised = _host.CpuLinear(engine, name, at, 0, n, k, epilogue, *small)

    def run(self, native: _host.CpuLinear, rows: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, self.k, generator=generator).to(self.act)
        out = torch.randn(rows, self.width, generator=generator).to(self.out_dtype)
        native(x.data_ptr(), out.data_ptr(), rows)
        return out


def quantised_levels() -> list[tuple[str, torch.dtype]]:
    """Where integers are read: by instruction set and dtype."""
    return [
        (isa, dtype)
        for isa, dtype in itertools.product(_host.cpu_isas(), DTYPES)
        if _host.CpuEngine(1, [], isa).quantised_rows(DTYPE_NAMES[dtype])
    ]


LEVELS = pytest.mark.parametrize(("isa", "dtype"), quantised_levels(), ids=str)


def test_integers_are_read_where_they_pay() -> None:
    isas, levels = _host.cpu_isas(), quantised_levels()
    assert [isa for isa, dtype in levels if dtype == torch.bfloat16] == isas[
        : "avx512_bf16" in isas
    ]
    wide = [isa for isa in isas if isa.startswith("avx512")]
    assert [isa for isa, dtype in levels if dtype == torch.float32] == wide
    assert not [isa for isa, dtype in levels if dtype == torch.float16]


@LEVELS
@OF_EACH_KIND
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_a_linear_has_the_same_bits_from_integers(
    isa: str, dtype: torch.dtype, kind: str, epilogue: str
) -> None:
    for num_threads, (n, k) in itertools.product((1, 2), SHAPES):
        engine = _host.CpuEngine(num_threads, [], isa)
        weight = random_blocks(kind, n + n % 2, columns_of(kind, k), dtype, seed=k)
        if epilogue != "silu_mul":
            weight = replace(weight, blocks=weight.blocks[:n].contiguous())
        linear = Linear(engine, weight, epilogue)
        for rows in ROWS:
            ours, theirs = linear.run(linear.quantised, rows), linear.run(linear.plain, rows)
            assert torch.equal(bits(ours), bits(theirs)), (num_threads, n, k, rows)


@LEVELS
@OF_EACH_KIND
def test_few_rows_read_the_integers_and_more_the_panels(
    isa: str, dtype: torch.dtype, kind: str
) -> None:
    engine = _host.CpuEngine(1, [], isa)
    few = engine.quantised_rows(DTYPE_NAMES[dtype])
    for lost in ("groups", "panels"):
        linear = Linear(engine, random_blocks(kind, 40, 256, dtype), "store_f32")
        whole = {rows: linear.run(linear.quantised, rows) for rows in ROWS}
        getattr(linear, lost).zero_()
        for rows in ROWS:
            same = torch.equal(linear.run(linear.quantised, rows), whole[rows])
            assert same == ((rows <= few) == (lost == "panels")), (lost, rows)


@ON_EACH_ISA
@IN_EACH_DTYPE
@OF_EACH_KIND
def test_operations_take_quantised_weights_anywhere(
    isa: str, dtype: torch.dtype, kind: str
) -> None:
    ops = small_ops(dtype, isa, num_threads=2)
    gate, up = (random_blocks(kind, 50, 256, dtype, seed) for seed in (1, 2))
    norm, bias, ids = torch.rand(50), torch.randn(50), torch.tensor([0, 49], dtype=torch.int32)

    def results(gate: Weight, up: Weight, rows: int) -> list[torch.Tensor]:
        x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows)).to(ops.act_dtype)
        outs = [torch.zeros(rows, 50) for _ in range(3)]
        normed, product = (torch.empty(rows, 50, dtype=ops.act_dtype) for _ in range(2))
        looked_up = torch.empty(2, 256)
        ops.linear(gate)(x, outs[0])
        ops.linear(gate, bias)(x, outs[1])
        ops.linear_add_norm(up, norm, 1e-5)(x, outs[2], normed)
        ops.gated(gate, up)(x, product)
        ops.embedding(gate)(ids, looked_up)
        return [*outs, normed, product, looked_up]

    for rows in (1, 3, 4, 5):
        pairs = zip(results(gate, up, rows), results(gate.dense(), up.dense(), rows), strict=True)
        assert all(torch.equal(bits(ours), bits(theirs)) for ours, theirs in pairs)


@OF_EACH_KIND
def test_other_backends_make_them_dense(kind: str) -> None:
    ops, weight = TorchOps(torch.float32), random_blocks(kind, 8, 256, torch.float32)
    makers: list[Callable[[Weight], torch.Tensor]] = []

    def product(one: Weight) -> torch.Tensor:
        out = torch.empty(3, 8)
        ops.linear(one)(torch.ones(3, 256), out)
        return out

    def gated(one: Weight) -> torch.Tensor:
        out = torch.empty(3, 8)
        ops.gated(one, one)(torch.ones(3, 256), out)
        return out

    makers += [product, gated]
    assert all(torch.equal(make(weight), make(weight.dense())) for make in makers)


# -- a whole model --------------------------------------------------------------------------------


@needs_embedded_model
def test_the_loader_keeps_what_the_file_quantises() -> None:
    checkpoint = resolve()
    stored = open_stored(checkpoint, torch.bfloat16)
    plain = open_weights(checkpoint, torch.bfloat16)
    for name in tensor_names(checkpoint.config):
        if ".layers." in name and ".layers.7." not in name:
            continue
        weight = stored(name)
        assert isinstance(weight, Quantised) == (plain(name).dim() == 2), name
        assert torch.equal(dense(weight), plain(name)), name


def steps_of(prompts: list[list[int]], num_decodes: list[int]) -> list[StepInputs]:
    """All prompts at once, then decodes of the first few of them; blocks of 16, 4 per sequence."""

    def int32(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    def step(spans: list[tuple[int, int]], tokens: list[list[int]]) -> StepInputs:
        counts = [last - first for first, last in spans]
        starts = [0, *itertools.accumulate(counts)]
        return StepInputs(
            token_ids=int32(sum(tokens, [])),
            positions=int32([p for first, last in spans for p in range(first, last)]),
            query_starts=int32(starts),
            context_lens=int32([last for _, last in spans]),
            block_table=torch.arange(4 * len(spans), dtype=torch.int32).view(len(spans), 4),
            logit_rows=int32(starts[1:]) - 1,
            num_decodes=len(spans) if max(counts) == 1 else 0,
            max_query_len=max(counts),
            max_context_len=max(last for _, last in spans),
        )

    lens = [len(prompt) for prompt in prompts]
    steps = [step([(0, n) for n in lens], prompts)]
    for count in num_decodes:
        steps.append(step([(n, n + 1) for n in lens[:count]], [[17 + n] for n in lens[:count]]))
        lens = [n + (i < count) for i, n in enumerate(lens)]
    return steps


@needs_embedded_model
def test_a_model_has_the_same_logits_from_its_file_as_from_dense_weights() -> None:
    checkpoint, dtype = resolve(), torch.bfloat16
    steps = steps_of([list(range(5 * n, 6 * n + 3)) for n in (20, 2, 7, 9, 1)], [1, 2, 4, 5])
    seen = []
    for weights in (open_stored(checkpoint, dtype), open_weights(checkpoint, dtype)):
        ops = backend.make_ops(checkpoint.config, dtype, num_threads=2)
        layout = kv.layout_of(checkpoint.config, 16, dtype)
        cache = ops.cache(layout, torch.zeros(20 * layout.block_bytes, dtype=torch.uint8))
        model = families.build(checkpoint.config, weights, ops)
        seen.append([model.forward(inputs, cache).clone() for inputs in steps])
    assert all(torch.equal(bits(ours), bits(theirs)) for ours, theirs in zip(*seen, strict=True))
    assert all(logits.isfinite().all() for logits in seen[0])
