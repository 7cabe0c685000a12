"""Attention on a GPU: every backend that is there against plain torch, eagerly and in graphs."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need triton")

from nodeserve.model.gpu.attention import choice, probe
from nodeserve.model.gpu.attention.case import TOLERANCE, Case, make_case
from nodeserve.model.gpu.attention.choice import Kind, Phase
from nodeserve.model.gpu.attention.paged import PagedAttention
from nodeserve.model.gpu.attention.parts import Heads, Part
from nodeserve.model.gpu.attention.reference import ReferenceAttention
from nodeserve.model.gpu.step import GpuStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

KINDS = [kind for kind in Kind if kind is not Kind.REFERENCE]
SHAPES = [  # dtype, head_dim, block_size
    *((torch.bfloat16, head_dim, 16) for head_dim in (64, 80, 128, 256)),
    *((torch.bfloat16, head_dim, 256) for head_dim in (64, 128, 256)),
    (torch.bfloat16, 128, 64),
    *((torch.float16, head_dim, 16) for head_dim in (64, 128)),
    (torch.float16, 128, 256),
]
DECODES = [(1, context) for context in (1, 15, 16, 17, 63, 64, 65, 1000, 4097, 32768)]
PREFILLS = [(17, 17), (1024, 1024), (3, 4000), (130, 32768), (257, 1000), (64, 64)]


def heads_of(head_dim: int = 128, block_size: int = 16, group: int = 4) -> Heads:
    return Heads(2 * group, 2, head_dim, block_size, torch.bfloat16)


def part_of(kind: Kind, phase: Phase, heads: Heads, windows: frozenset[int | None]) -> Part:
    """The part, as the choice would make it; skips where it cannot be used here."""
    device = torch.device("cuda")
    facts = probe.facts_of(heads, windows, device)
    reason = choice.refusal(kind, facts)
    if kind not in choice.ORDER[phase]:
        pytest.skip(f"{kind.value} is not for {phase.value}")
    if reason is not None:
        pytest.skip(f"{kind.value}: {reason}")
    return probe.Maker(facts, device).part(kind, phase)


def backend_of(part: Part) -> PagedAttention:
    return PagedAttention(part, part, part.name)


def check(part: Part, heads: Heads, lengths: list[tuple[int, int]], window: int | None) -> None:
    case = make_case(heads, lengths, torch.device("cuda"), trap=probe.TRAP)
    longest = max(context for _, context in lengths)
    part.reserve(len(lengths) * longest, len(lengths), longest)
    assert case.error(backend_of(part), window) < TOLERANCE[heads.dtype]


@pytest.mark.parametrize("window", [None, 500])
@pytest.mark.parametrize(("dtype", "head_dim", "block_size"), SHAPES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_decodes(
    kind: Kind, dtype: torch.dtype, head_dim: int, block_size: int, window: int | None
) -> None:
    heads = dataclasses.replace(heads_of(head_dim, block_size), dtype=dtype)
    check(part_of(kind, Phase.DECODE, heads, frozenset({window})), heads, DECODES, window)


@pytest.mark.parametrize("window", [None, 500])
@pytest.mark.parametrize(("dtype", "head_dim", "block_size"), SHAPES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_prefills(
    kind: Kind, dtype: torch.dtype, head_dim: int, block_size: int, window: int | None
) -> None:
    heads = dataclasses.replace(heads_of(head_dim, block_size), dtype=dtype)
    check(part_of(kind, Phase.PREFILL, heads, frozenset({window})), heads, PREFILLS, window)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16, 32])
def test_groups(group: int) -> None:
    heads = heads_of(group=group)
    for phase, lengths in ((Phase.DECODE, DECODES), (Phase.PREFILL, [(300, 700), (2, 90)])):
        check(part_of(Kind.TRITON, phase, heads, frozenset({None})), heads, lengths, None)


@pytest.mark.parametrize("num_seqs", [1, 8, 33, 64, 256, 300])
def test_batches(num_seqs: int) -> None:
    """Batches that fill the device with few splits, or none, and those that need many."""
    heads = Heads(32, 8, 128, 16, torch.bfloat16)
    lengths = [(1, 1 + seq * 2731 % 3000) for seq in range(num_seqs)]
    check(part_of(Kind.TRITON, Phase.DECODE, heads, frozenset({None})), heads, lengths, None)


def with_contexts(case: Case, contexts: list[int]) -> GpuStep:
    """The case's step with shorter contexts in the very same tensors."""
    wanted = torch.tensor(contexts, dtype=torch.int32, device=case.query.device)
    case.step.context_lens.copy_(wanted)
    return case.step


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_captured_decode_fits_other_contexts(kind: Kind) -> None:
    """Captured at one set of contexts, replayed at others: shorter, of 1, and the first again."""
    heads = heads_of(block_size=256 if kind in (Kind.FLASH_PAGED, Kind.TORCH_PAGED) else 16)
    part = part_of(kind, Phase.DECODE, heads, frozenset({None}))
    backend, judge = backend_of(part), backend_of(ReferenceAttention())
    case = make_case(heads, [(1, 9000)] * 5, torch.device("cuda"), trap=probe.TRAP)
    backend.reserve(5, 5, 9000)
    out = torch.empty_like(case.query)

    def attend() -> None:
        backend.plan(case.step)
        backend.attend(case.query, case.pages, case.step, out, None)

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    for contexts in ([9000] * 5, [1, 17, 8000, 300, 64], [1] * 5, [4096, 1, 9000, 9000, 2]):
        wanted = Case(case.query, case.pages, with_contexts(case, contexts)).run(judge, None)
        out.fill_(torch.nan)
        graph.replay()
        distance = (out.float() - wanted.float()).norm(dim=-1) / wanted.float().norm(dim=-1)
        assert float(distance.max()) < TOLERANCE[heads.dtype]


def test_splits_meet_without_a_race() -> None:
    """Many splits that end at the same time, merged by whoever is last: always the same bits."""
    heads = Heads(32, 8, 128, 16, torch.bfloat16)
    backend = backend_of(part_of(Kind.TRITON, Phase.DECODE, heads, frozenset({None})))
    case = make_case(heads, [(1, 2048)] * 4, torch.device("cuda"))
    backend.reserve(4, 4, 2048)
    first = case.run(backend, None)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(500):
        different += (case.run(backend, None) != first).sum()
    assert int(different) == 0
    assert case.error(backend, None) < TOLERANCE[heads.dtype]


@pytest.mark.parametrize("wish", ["auto", "triton"])
def test_a_real_device_gets_kernels(wish: str) -> None:
    """Nobody is left with the reference, which could not be captured."""
    backend = probe.make_attention(heads_of(), frozenset({None}), torch.device("cuda"), wish)
    assert "reference" not in backend.name.split(" (")[0]
    assert backend.capturable
