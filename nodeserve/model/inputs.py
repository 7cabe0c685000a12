"""What one step reads: built by the worker, passed to the forward pass, owned by neither."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The tokens of one step, sequence after sequence. All tensors are int32, contiguous, on CPU.

    A sequence's tokens are the last ones of its context: its positions are `context_len - n` to
    `context_len - 1`. Their keys and values are written to the pages of its blocks in this step.
    """

    token_ids: torch.Tensor  # [num_tokens]
    positions: torch.Tensor  # [num_tokens]
    query_starts: torch.Tensor  # [num_seqs + 1] exclusive prefix sum of tokens per sequence
    context_lens: torch.Tensor  # [num_seqs] tokens visible after this step
    block_table: torch.Tensor  # [num_seqs, max_blocks] -1 pads
    logit_rows: torch.Tensor  # [num_logits] rows of the step whose next-token logits are wanted
