"""Each native kernel against plain torch, and the promise that bits depend on a row alone."""

import itertools

import pytest
import torch
from torch.nn import functional

from nodeserve import _host
from nodeserve.config import ModelConfig
from nodeserve.model import kv, rotary
from nodeserve.model.inputs import StepInputs
from nodeserve.model.ops_cpu import CpuOps
from nodeserve.model.ops_torch import TorchOps

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
ISAS = _host.cpu_isas()
ON_EACH_ISA = pytest.mark.parametrize("isa", ISAS)
IN_EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Activations are rounded to bfloat16 with it; float16 weights meet float32 activations.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 2e-5, torch.float16: 2e-5}


def _config(
    num_heads: int = 6, num_kv_heads: int = 2, head_dim: int = 64, **rest: object
) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_layers=2,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=2048,
        norm_eps=1e-5,
        rope_theta=10000.0,
        **rest,  # type: ignore[arg-type]
    )


def _ops(dtype: torch.dtype, isa: str = "", num_threads: int = 1) -> CpuOps:
    return CpuOps(_config(), dtype, num_threads=num_threads, isa=isa)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _close(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> bool:
    scale = theirs.float().abs().max().clamp(min=1.0)
    return bool((ours.float() - theirs.float()).abs().max() <= TOLERANCE[dtype] * scale)


# -- linears --------------------------------------------------------------------------------------

SHAPES = [
    (1, 32, 64),
    (2, 33, 1),
    (5, 7, 65),
    (12, 96, 130),
    (13, 64, 63),
    (31, 100, 576),
    (300, 40, 31),
]


@ON_EACH_ISA
@IN_EACH_DTYPE
@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
def test_linear(isa: str, dtype: torch.dtype, rows: int, n: int, k: int) -> None:
    ops = _ops(dtype, isa)
    x = _random(rows, k, seed=1, dtype=ops.act_dtype)
    weight, bias = _random(n, k, seed=2, dtype=dtype), _random(n, seed=3)
    plain = functional.linear(x.float(), weight.float())
    out = torch.empty(rows, n)
    ops.linear(weight)(x, out)
    assert _close(out, plain, torch.float32)
    ops.linear(weight, bias)(x, out)
    assert _close(out, plain + bias, torch.float32)
    residual = _random(rows, n, seed=4)
    added = residual.clone()
    ops.linear_add(weight)(x, added)
    assert _close(added, residual + plain, torch.float32)


@ON_EACH_ISA
@IN_EACH_DTYPE
@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
def test_gated_linear(isa: str, dtype: torch.dtype, rows: int, n: int, k: int) -> None:
    ops = _ops(dtype, isa)
    x = _random(rows, k, seed=1, dtype=ops.act_dtype)
    gate, up = _random(n, k, seed=2, dtype=dtype) * 0.2, _random(n, k, seed=3, dtype=dtype) * 0.2
    out = torch.empty(rows, n, dtype=ops.act_dtype)
    ops.gated(gate, up)(x, out)
    plain = functional.silu(x.float() @ gate.float().T) * (x.float() @ up.float().T)
    assert _close(out, plain, dtype)


@ON_EACH_ISA
@IN_EACH_DTYPE
def test_a_linear_row_has_the_same_bits_in_every_tile(isa: str, dtype: torch.dtype) -> None:
    n, k = 107, 133
    weight, x = _random(n, k, dtype=dtype), _random(300, k, seed=1)
    results = []
    for num_threads, rows in itertools.product((1, 2), (1, 2, 3, 7, 12, 13, 16, 300)):
        ops = _ops(dtype, isa, num_threads)
        out = torch.empty(rows, n)
        ops.linear(weight)(x[:rows].to(ops.act_dtype), out)
        results.append(out)
    whole = results[-1]
    assert all(torch.equal(part, whole[: len(part)]) for part in results)


# -- norm, embedding ------------------------------------------------------------------------------


@ON_EACH_ISA
@IN_EACH_DTYPE
@pytest.mark.parametrize("width", [16, 64, 77, 576])
def test_rms_norm(isa: str, dtype: torch.dtype, width: int) -> None:
    ops = _ops(dtype, isa)
    x, weight = _random(9, width) * 3, _random(width, seed=1)
    out = torch.empty(9, width, dtype=ops.act_dtype)
    ops.rms_norm(weight, 1e-5)(x, out)
    plain = functional.rms_norm(x, (width,), weight, 1e-5)
    assert _close(out, plain, dtype)


@ON_EACH_ISA
@IN_EACH_DTYPE
def test_embedding(isa: str, dtype: torch.dtype) -> None:
    table = _random(50, 77, dtype=dtype)
    token_ids = torch.tensor([0, 49, 7, 7], dtype=torch.int32)
    out = torch.empty(4, 77)
    _ops(dtype, isa).embedding(table)(token_ids, out)
    assert torch.equal(out, table.float()[token_ids])


# -- attention ------------------------------------------------------------------------------------


class Sequences:
    """Ragged sequences with made q, k and v, run through `ops` in steps of any cut."""

    def __init__(self, config: ModelConfig, lengths: list[int], block_size: int = 16) -> None:
        self.config = config
        self.lengths = lengths
        self.block_size = block_size
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = [_random(length, width, seed=i) for i, length in enumerate(lengths)]
        counts = [-(-length // block_size) for length in lengths]
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(5))
        order = order.to(torch.int32)
        ends = itertools.accumulate(counts)
        self.blocks = [order[end - n : end] for end, n in zip(ends, counts, strict=True)]

    def cache(self, ops: CpuOps | TorchOps) -> object:
        layout = kv.layout_of(self.config, self.block_size, ops.dtype)
        num_blocks = sum(len(blocks) for blocks in self.blocks)
        return ops.cache(layout, torch.zeros(num_blocks * layout.block_bytes, dtype=torch.uint8))

    def inputs(self, spans: dict[int, tuple[int, int]]) -> StepInputs:
        """spans: sequence -> its tokens [first, last) of this step."""

        def int32(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32)

        table = torch.full((len(spans), max(map(len, self.blocks))), -1, dtype=torch.int32)
        for row, seq in enumerate(spans):
            table[row, : len(self.blocks[seq])] = self.blocks[seq]
        counts = [last - first for first, last in spans.values()]
        positions = [p for first, last in spans.values() for p in range(first, last)]
        return StepInputs(
            token_ids=int32(positions),
            positions=int32(positions),
            query_starts=int32([0, *itertools.accumulate(counts)]),
            context_lens=int32([last for _, last in spans.values()]),
            block_table=table,
            logit_rows=int32([]),
            num_decodes=0,
            max_query_len=max(counts),
            max_context_len=max(last for _, last in spans.values()),
        )

    def run(
        self, ops: CpuOps | TorchOps, steps: list[dict[int, tuple[int, int]]], layer: int = 1
    ) -> list[torch.Tensor]:
        """Attention's output for every token of every sequence."""
        norms = None
        if self.config.qk_norm:
            norms = (_random(self.config.head_dim, seed=8), _random(self.config.head_dim, seed=9))
        attention = ops.attention(self.config, layer, rotary.tables(self.config), norms)
        width = self.config.num_heads * self.config.head_dim
        outs = [torch.zeros(n, width, dtype=ops.act_dtype) for n in self.lengths]
        cache = self.cache(ops)
        for spans in steps:
            step = ops.begin(self.inputs(spans), cache)  # type: ignore[arg-type]
            qkv = torch.cat([self.qkv[seq][a:b] for seq, (a, b) in spans.items()])
            query = torch.empty(len(qkv), width, dtype=ops.act_dtype)
            out = torch.empty_like(query)
            attention.store(step, qkv, query)  # type: ignore[arg-type]
            attention.attend(step, query, out)  # type: ignore[arg-type]
            parts = torch.split(out, [b - a for a, b in spans.values()])
            for seq, part in zip(spans, parts, strict=True):
                outs[seq][slice(*spans[seq])] = part
        return outs

    def whole(self) -> list[dict[int, tuple[int, int]]]:
        return [{seq: (0, length) for seq, length in enumerate(self.lengths)}]

    def alone(self, chunk: int) -> list[dict[int, tuple[int, int]]]:
        return [
            {seq: (at, min(at + chunk, length))}
            for seq, length in enumerate(self.lengths)
            for at in range(0, length, chunk)
        ]


GEOMETRIES = [
    _config(num_heads=2, num_kv_heads=2, head_dim=64),
    _config(num_heads=9, num_kv_heads=3, head_dim=64),
    _config(num_heads=4, num_kv_heads=1, head_dim=80, qk_norm=True),
    _config(num_heads=8, num_kv_heads=1, head_dim=96),
    _config(num_heads=8, num_kv_heads=2, head_dim=128, qk_norm=True),
    _config(num_heads=2, num_kv_heads=1, head_dim=256),
    _config(num_heads=32, num_kv_heads=1, head_dim=64),
    _config(num_heads=3, num_kv_heads=1, head_dim=64, sliding_window=37),
]


def _geometry(config: ModelConfig) -> str:
    window = f"-window{config.sliding_window}" if config.sliding_window else ""
    return f"{config.num_heads}of{config.num_kv_heads}x{config.head_dim}{window}"


@ON_EACH_ISA
@IN_EACH_DTYPE
@pytest.mark.parametrize("config", GEOMETRIES, ids=_geometry)
def test_attention(isa: str, dtype: torch.dtype, config: ModelConfig) -> None:
    sequences = Sequences(config, [1, 70, 16, 33])
    native = CpuOps(config, dtype, isa=isa)
    ours = sequences.run(native, sequences.whole())
    theirs = sequences.run(TorchOps(dtype), sequences.whole())
    tolerance = {torch.bfloat16: 0.03, torch.float32: 2e-5, torch.float16: 4e-3}[dtype]
    for mine, other in zip(ours, theirs, strict=True):
        limit = tolerance * max(1.0, float(other.abs().max()))
        assert (mine.float() - other.float()).abs().max() < limit


@pytest.mark.parametrize("window", [None, 700])
def test_attention_over_several_chunks_of_the_context(window: int | None) -> None:
    config = _config(num_heads=3, num_kv_heads=1, sliding_window=window)
    sequences = Sequences(config, [1500, 513], block_size=32)
    ours = sequences.run(CpuOps(config, torch.float32), sequences.whole())
    theirs = sequences.run(TorchOps(torch.float32), sequences.whole())
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() < 2e-5


@IN_EACH_DTYPE
@pytest.mark.parametrize("config", [GEOMETRIES[1], GEOMETRIES[4], GEOMETRIES[7]], ids=_geometry)
def test_attention_bits_do_not_depend_on_company_cuts_or_threads(
    dtype: torch.dtype, config: ModelConfig
) -> None:
    sequences = Sequences(config, [600, 1, 45, 130])
    reference = sequences.run(CpuOps(config, dtype), sequences.whole())
    for num_threads, chunk in itertools.product((1, 2), (1, 7, 16, 129, 600)):
        if (num_threads, chunk) == (2, 1):
            continue
        ops = CpuOps(config, dtype, num_threads=num_threads)
        outs = sequences.run(ops, sequences.alone(chunk))
        assert all(map(torch.equal, outs, reference)), f"{num_threads} threads, chunks of {chunk}"
    outs = sequences.run(CpuOps(config, dtype, num_threads=2), sequences.whole())
    assert all(map(torch.equal, outs, reference))


@IN_EACH_DTYPE
def test_what_a_former_owner_left_in_a_block_does_not_matter(dtype: torch.dtype) -> None:
    config, ops = GEOMETRIES[1], CpuOps(GEOMETRIES[1], dtype)
    sequences = Sequences(config, [40, 5])
    clean = sequences.run(ops, sequences.whole())
    layout = kv.layout_of(config, 16, dtype)
    pool = torch.full((4 * layout.block_bytes,), 0xFF, dtype=torch.uint8)  # NaN in every type
    sequences.cache = lambda ops: ops.cache(layout, pool)  # type: ignore[method-assign]
    assert all(map(torch.equal, sequences.run(ops, sequences.whole()), clean))


def test_token_outside_the_vocabulary_is_refused() -> None:
    embedding = _ops(torch.float32).embedding(_random(10, 16))
    with pytest.raises(ValueError, match="^token_ids"):
        embedding(torch.tensor([10], dtype=torch.int32), torch.empty(1, 16))


def test_position_beyond_the_rotary_table_is_refused() -> None:
    sequences = Sequences(_config(), [2049])
    with pytest.raises(ValueError, match="^plan: a position"):
        sequences.run(_ops(torch.float32), sequences.whole())
