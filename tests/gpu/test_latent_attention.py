"""Attention over latents on a GPU against plain torch, eagerly and in graphs."""

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need triton")

from nodeserve.model.gpu.attention import probe
from nodeserve.model.gpu.attention.case import TOLERANCE
from nodeserve.model.gpu.attention.latent_choice import (
    LatentCase,
    make_latent_attention,
    make_latent_case,
)
from nodeserve.model.gpu.attention.latent_parts import LatentHeads, LatentReference
from nodeserve.model.gpu.attention.paged import PagedAttention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DECODES = [(1, context) for context in (1, 15, 16, 17, 31, 32, 33, 1000, 4097, 32768)]
PREFILLS = [(17, 17), (1024, 1024), (3, 4000), (130, 8192), (257, 1000), (64, 64)]
CUDA = torch.device("cuda")


def heads_of(num_heads: int, dtype: torch.dtype = torch.bfloat16, size: int = 16) -> LatentHeads:
    """DeepSeek's latents, with so many heads of a model or of its shard."""
    return LatentHeads(num_heads, 512, 64, 192**-0.5, size, dtype)


def backend_of(heads: LatentHeads) -> PagedAttention:
    """Our kernels, which the choice has tried: it raises where they are wrong."""
    return make_latent_attention(heads, CUDA, "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("num_heads", [4, 16, 32, 64, 128])
def test_decodes_and_prefills(num_heads: int, size: int, dtype: torch.dtype) -> None:
    heads = heads_of(num_heads, dtype, size)
    backend = backend_of(heads)
    for lengths in (DECODES, PREFILLS, DECODES[:4] + PREFILLS[:3]):
        case = make_latent_case(heads, lengths, CUDA, trap=probe.TRAP)
        backend.reserve(case.step.num_tokens, len(lengths), 32768)
        assert case.error(backend) < TOLERANCE[dtype]


@pytest.mark.parametrize("num_seqs", [1, 33, 256, 300])
def test_batches(num_seqs: int) -> None:
    """Batches that fill the device with few splits, or none, and those that need many."""
    heads = heads_of(16)
    lengths = [(1, 1 + seq * 2731 % 3000) for seq in range(num_seqs)]
    case = make_latent_case(heads, lengths, CUDA, trap=probe.TRAP)
    assert case.error(backend_of(heads)) < TOLERANCE[heads.dtype]


@pytest.mark.parametrize("num_heads", [16, 128])
def test_a_captured_decode_fits_other_contexts(num_heads: int) -> None:
    """Captured at one set of contexts, replayed at others: shorter, of 1, and the first again."""
    heads = heads_of(num_heads)
    reference = LatentReference(heads)
    judge = PagedAttention(reference, reference, reference.name)
    backend = backend_of(heads)
    case = make_latent_case(heads, [(1, 9000)] * 5, CUDA, trap=probe.TRAP)
    backend.reserve(5, 5, 9000)
    out = torch.empty(5, num_heads, heads.rank, dtype=heads.dtype, device=CUDA)

    def attend() -> None:
        backend.plan(case.step)
        backend.attend(case.query, case.pages, case.step, out, None)

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    for contexts in ([9000] * 5, [1, 17, 8000, 300, 64], [1] * 5, [4096, 1, 9000, 9000, 2]):
        case.step.context_lens.copy_(torch.tensor(contexts, dtype=torch.int32, device=CUDA))
        wanted = LatentCase(case.query, case.pages, case.step, heads).run(judge).float()
        out.fill_(torch.nan)
        graph.replay()
        distance = (out.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert float(distance.max()) < TOLERANCE[heads.dtype]


def test_splits_meet_without_a_race() -> None:
    """Many splits that end at the same time, merged by whoever is last: always the same bits."""
    heads = heads_of(128)
    backend = backend_of(heads)
    case = make_latent_case(heads, [(1, 2048)] * 4, CUDA)
    backend.reserve(4, 4, 2048)
    first = case.run(backend)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(500):
        different += (case.run(backend) != first).sum()
    assert int(different) == 0
    assert case.error(backend) < TOLERANCE[heads.dtype]
