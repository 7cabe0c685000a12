"""Attention in plain torch, sequence by sequence in float32: the judge of the kernels.

Right and slow; it reads lengths back from the device, so a step with it cannot be captured.
"""

import torch

from nodeserve.model.gpu.attention.parts import Segment


class ReferenceAttention:
    """A part for decodes and prefills of any shape."""

    name = "reference"
    capturable = False

    def reserve(self, max_tokens: int, max_seqs: int, max_context_len: int) -> None:
        pass  # needs no scratch

    def run(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        segment: Segment,
        out: torch.Tensor,
        window: int | None,
    ) -> None:
        starts, contexts = segment.query_starts.tolist(), segment.context_lens.tolist()
        block_size = pages.size(3)
        for seq, (first, end, context) in enumerate(
            zip(starts, starts[1:], contexts, strict=False)
        ):
            blocks = segment.block_table[seq, : -(-context // block_size)].long()
            # [2, num_kv_heads, context, head_dim]
            held = pages[blocks].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context]
            out[first:end].copy_(attention(query[first:end], held[0], held[1], window))


def attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Causal attention of one sequence, whose queries are the last tokens of its context.

    query and result [tokens, num_heads, head_dim], the result in float32
    keys, values [num_kv_heads, context, head_dim]
    """
    tokens, num_heads, head_dim = query.shape
    context = keys.size(1)
    if context == 0:
        return torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    group = num_heads // keys.size(0)
    keys = keys.float().repeat_interleave(group, 0)
    values = values.float().repeat_interleave(group, 0)
    scores = torch.einsum("thd,hcd->htc", query.float(), keys) * head_dim**-0.5
    row = torch.arange(context - tokens, context, device=query.device)[:, None]
    distance = row - torch.arange(context, device=query.device)
    hidden = (distance < 0) | (distance >= (window or context))
    return torch.einsum("htc,hcd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)
