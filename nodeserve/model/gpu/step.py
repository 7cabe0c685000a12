"""What the layers of one step share on a GPU, and what an attention backend has to offer.

Graphs: a captured step is replayed with other numbers in the same tensors, so all that may differ
between two replays is in tensors, and the ints are limits that hold for every replay. Rows that
fill a batch up to a captured size are sequences like any other: one token at position 0, a context
of 1, in a block that belongs to nobody. So no kernel asks how many rows are real.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


@dataclass(frozen=True, slots=True)
class GpuStep:
    """One step's geometry. All tensors are int32, contiguous and on the device.

    Sequences lie one after the other; the first `num_decodes` have exactly one token each, so there
    row i is sequence i. A sequence's tokens are the last ones of its context.
    """

    token_ids: torch.Tensor  # [num_tokens]
    positions: torch.Tensor  # [num_tokens]
    slots: torch.Tensor  # [num_tokens] where K and V go: block * block_size + place inside it
    query_starts: torch.Tensor  # [num_seqs + 1] exclusive prefix sum of tokens per sequence
    context_lens: torch.Tensor  # [num_seqs] tokens visible in this step, its own included
    block_table: torch.Tensor  # [num_seqs, max_blocks]; past a context: anything, often -1
    num_decodes: int
    max_query_len: int  # no sequence has more tokens in this step
    max_context_len: int  # no context is longer

    @property
    def num_tokens(self) -> int:
        return self.positions.numel()

    @property
    def num_seqs(self) -> int:
        return self.context_lens.numel()


class GpuPass(NamedTuple):
    """What `begin` gives to the layers."""

    step: GpuStep
    layers: tuple[torch.Tensor, ...]  # each layer's pages, GpuCache.layers


class AttentionBackend(Protocol):
    """Attention over the pages, one instance for all layers of a model.

    Scores are scaled by head_dim ** -0.5. Query head h reads K/V head h // (heads // kv_heads).
    Over latents (MLA) a query is [num_heads, latent_dim], what comes out [num_heads, kv_lora_rank],
    and the model says the scale; pages have one plane and one head.
    """

    name: str  # for logs: "flash-attn", "triton", ...

    def reserve(self, max_tokens: int, max_seqs: int, max_context_len: int) -> None:
        """Make scratch for steps up to these sizes, so that `plan` and `attend` allocate nothing.

        Captured graphs hold on to that scratch: called with smaller sizes, it stays as it is.
        """

    def plan(self, step: GpuStep) -> None:
        """Once per step, before its first `attend`; may launch kernels, may not read tensors."""

    def attend(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        step: GpuStep,
        out: torch.Tensor,
        window: int | None,
    ) -> None:
        """Write the attention of every row of the step to `out`; no host reads, no allocation.

        query, out [num_tokens, num_heads, head_dim] act, contiguous, rotated already
        pages [num_blocks, 2, num_kv_heads, block_size, head_dim] act, one layer's strided view of
        the pool; the step's own K and V are in it
        window: tokens that a query sees, itself included; None: all up to its own position
        """
