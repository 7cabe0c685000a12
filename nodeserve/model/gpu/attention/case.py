"""Random steps over random pages: a backend is tried on them before it serves, and in tests.

A case is built to be noticed: what lies in the pages past a context is a trap (NaN, if not said
otherwise), so a kernel that reads one token too many says so; and a few values of every context are
so large that a kernel that leaves one of them out is far off, however long the context.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nodeserve.model.gpu.attention.paged import PagedAttention
from nodeserve.model.gpu.attention.parts import Heads
from nodeserve.model.gpu.attention.reference import ReferenceAttention
from nodeserve.model.gpu.step import AttentionBackend, GpuStep

MARKS = 8  # large values in a context, beside its first and its last ones
# Of a row's distance from the reference in float32, in lengths of the row: roundings to the type of
# the scores' weights and of the result, with room for an order of summation.
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 1e-5}


@dataclass(frozen=True, slots=True)
class Case:
    """The arguments of one attention call."""

    query: torch.Tensor  # [num_tokens, num_heads, head_dim]
    pages: torch.Tensor  # [num_blocks, 2, num_kv_heads, block_size, head_dim], strided
    step: GpuStep

    def run(self, backend: AttentionBackend, window: int | None) -> torch.Tensor:
        """The backend's answer, [num_tokens, num_heads, head_dim]; rows it leaves out are NaN."""
        out = torch.full_like(self.query, torch.nan)
        backend.plan(self.step)
        backend.attend(self.query, self.pages, self.step, out, window)
        return out

    def error(self, backend: AttentionBackend, window: int | None) -> float:
        """The largest distance of a head's row from the reference, in lengths of the row; NaN if
        there is a NaN in the backend's answer."""
        part = ReferenceAttention()
        wanted = self.run(PagedAttention(part, part, part.name), window).float()
        distance = (self.run(backend, window).float() - wanted).norm(dim=-1)
        return float((distance / wanted.norm(dim=-1).clamp_min(1e-30)).max())


def _values(heads: Heads, context: int, generator: torch.Generator) -> torch.Tensor:
    """Random K and V of a context, [context, 2, num_kv_heads, head_dim] in float32."""
    shape = (context, 2, heads.num_kv_heads, heads.head_dim)
    kv = torch.randn(shape, generator=generator, device=generator.device)
    marks = torch.randint(context, (MARKS,), generator=generator, device=generator.device)
    edges = torch.tensor([0, max(context - 2, 0), context - 1], device=generator.device)
    at = torch.cat([marks, edges])
    kv[at, 1] = kv[at, 1] * (
        1 + context**0.5
    )  # not in place: a mark that is twice in `at` counts once
    return kv


def make_case(
    heads: Heads,
    lengths: Sequence[tuple[int, int]],
    device: torch.device,
    *,
    seed: int = 0,
    num_layers: int = 2,
    trap: float = torch.nan,
) -> Case:
    """A step of sequences given as (tokens of this step, context). Leading sequences of one token
    are its decodes; a context of 0 is a padding row's. `trap` fills the pages past the contexts."""
    generator = torch.Generator(device).manual_seed(seed)
    counts = [-(-context // heads.block_size) for _, context in lengths]
    num_blocks = sum(counts) + 1
    shape = (num_blocks, num_layers, 2, heads.num_kv_heads, heads.block_size, heads.head_dim)
    pool = torch.full(shape, trap, dtype=heads.dtype, device=device)
    pages = pool[:, num_layers - 1]
    order = torch.randperm(num_blocks, generator=generator, device=device)
    blocks = torch.split(order, [*counts, 1])
    table = torch.full((len(lengths), max(counts) + 1), -1, dtype=torch.int32, device=device)
    for seq, (_, context) in enumerate(lengths):
        table[seq, : counts[seq]] = blocks[seq]
        if context:
            at = torch.arange(context, device=device)
            kv = _values(heads, context, generator).to(heads.dtype)
            pages[blocks[seq][at // heads.block_size], :, :, at % heads.block_size] = kv
    num_tokens = sum(tokens for tokens, _ in lengths)
    rows = (num_tokens, heads.num_heads, heads.head_dim)
    query = torch.randn(rows, generator=generator, device=device).to(heads.dtype)
    return Case(query, pages, step_of(heads.block_size, lengths, table))


def step_of(block_size: int, lengths: Sequence[tuple[int, int]], table: torch.Tensor) -> GpuStep:
    """The step of sequences given as for `make_case`; table [num_seqs, max_blocks] int32."""
    device = table.device
    tokens = torch.tensor([n for n, _ in lengths], device=device)
    contexts = torch.tensor([context for _, context in lengths], device=device)
    starts = torch.cat([tokens.new_zeros(1), tokens.cumsum(0)])
    seqs = torch.repeat_interleave(torch.arange(len(lengths), device=device), tokens)
    rows = torch.arange(len(seqs), device=device) - starts[seqs]
    positions = (contexts - tokens)[seqs].clamp_min(0) + rows
    slots = table[seqs, positions // block_size] * block_size + positions % block_size
    num_decodes = next((i for i, (n, _) in enumerate(lengths) if n != 1), len(lengths))
    return GpuStep(
        torch.zeros_like(positions, dtype=torch.int32),
        positions.int(),
        slots.int(),
        starts.int(),
        contexts.int(),
        table,
        num_decodes,
        max(n for n, _ in lengths),
        max(context for _, context in lengths),
    )
