"""What one step reads: built by the worker, passed to the forward pass, owned by neither."""

from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The tokens of one step, sequence after sequence, decodes first.

    All tensors are int32, contiguous and on the model's device. The ints are what a device that
    runs ahead of us must know without reading them; for a captured step they are limits.

    A sequence's tokens are the last ones of its context: its positions are `context_len - n` to
    `context_len - 1`. Their keys and values are written to the pages of its blocks in this step.
    """

    token_ids: torch.Tensor  # [num_tokens]
    positions: torch.Tensor  # [num_tokens]
    query_starts: torch.Tensor  # [num_seqs + 1] exclusive prefix sum of tokens per sequence
    context_lens: torch.Tensor  # [num_seqs] tokens visible after this step
    block_table: torch.Tensor  # [num_seqs, max_blocks] -1 pads
    logit_rows: torch.Tensor  # [num_logits] rows of the step whose next-token logits are wanted
    num_decodes: int  # leading sequences with exactly one token each
    max_query_len: int  # tokens of the longest sequence in this step
    max_context_len: int  # tokens of the longest context

    def to(self, device: torch.device) -> "StepInputs":
        """The same on `device`; copies from pinned memory do not wait."""
        if self.token_ids.device == device:
            return self
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS}
        return replace(self, **moved)


_TENSORS = tuple(field.name for field in fields(StepInputs) if field.type is torch.Tensor)
