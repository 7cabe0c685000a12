"""A step cut in two: its decodes and its prefill chunks, each with a kernel of its own."""

from dataclasses import dataclass
from typing import Protocol

import torch

from nodeserve.model.gpu.step import GpuStep


@dataclass(frozen=True, slots=True)
class Heads:
    """What all layers of a model have in common, as far as attention is concerned."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens
    dtype: torch.dtype

    @property
    def group(self) -> int:
        """Query heads of one K/V head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class Segment:
    """Sequences of a step that lie together, as if they were all. Tensors are int32, on the device.

    Queries are the last tokens of their contexts.
    """

    query_starts: torch.Tensor  # [num_seqs + 1] rows of the segment, from 0
    context_lens: torch.Tensor  # [num_seqs]
    block_table: torch.Tensor  # [num_seqs, max_blocks]
    max_query_len: int
    max_context_len: int

    @property
    def num_seqs(self) -> int:
        return self.context_lens.numel()


class Part(Protocol):
    """Attention for segments of one kind."""

    name: str  # for logs
    capturable: bool  # by a CUDA graph: launches follow from host ints alone

    def reserve(self, max_tokens: int, max_seqs: int, max_context_len: int) -> None:
        """Make scratch, so that `run` allocates nothing up to these sizes; it never shrinks."""

    def run(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        segment: Segment,
        out: torch.Tensor,
        window: int | None,
    ) -> None:
        """query, out [the segment's tokens, num_heads, head_dim]

        pages and window are as in `AttentionBackend.attend`.
        """


def decodes_of(step: GpuStep) -> Segment | None:
    """The leading sequences with one token each."""
    count = step.num_decodes
    if count == 0:
        return None
    return Segment(
        step.query_starts[: count + 1],
        step.context_lens[:count],
        step.block_table[:count],
        1,
        step.max_context_len,
    )


def prefills_of(step: GpuStep) -> Segment | None:
    """The sequences after the decodes."""
    count = step.num_decodes
    if count == step.num_seqs:
        return None
    starts = step.query_starts[count:]
    return Segment(
        starts - count if count else starts,  # a decode is one row: `count` rows come before
        step.context_lens[count:],
        step.block_table[count:],
        step.max_query_len,
        step.max_context_len,
    )
