"""A step's inputs as a leader's record, for workers whose device is the processor.

Seven counts and the arrays behind them, int32 as they are staged; a follower reads them into
memory of its own, at the same sizes.
"""

import numpy as np
import torch

from nodeserve.model.inputs import StepInputs

_NUM_COUNTS = 7


def packed(inputs: StepInputs) -> bytes:
    """O(tokens + blocks of the longest sequence * sequences)."""
    num_seqs, width = inputs.block_table.shape
    counts = np.array(
        [
            inputs.token_ids.numel(),
            num_seqs,
            width,
            inputs.logit_rows.numel(),
            inputs.num_decodes,
            inputs.max_query_len,
            inputs.max_context_len,
        ],
        np.int32,
    )
    arrays = (
        inputs.token_ids,
        inputs.positions,
        inputs.query_starts,
        inputs.context_lens,
        inputs.block_table,
        inputs.logit_rows,
    )
    return b"".join([counts.tobytes(), *(one.numpy().tobytes() for one in arrays)])


class PlanReader:
    """What `read` returns is valid until the next `read`."""

    def __init__(self) -> None:
        self._memory = torch.zeros(0, dtype=torch.int32)

    def read(self, plan: bytes) -> StepInputs:
        """The inputs that a leader packed."""
        ints = np.frombuffer(plan, np.int32)
        if self._memory.numel() < ints.size:
            self._memory = torch.zeros(2 * ints.size, dtype=torch.int32)
        self._memory.numpy()[: ints.size] = ints
        num_tokens, num_seqs, width, num_rows, num_decodes, longest, context = ints[
            :_NUM_COUNTS
        ].tolist()
        sizes = [num_tokens, num_tokens, num_seqs + 1, num_seqs, num_seqs * width, num_rows]
        token_ids, positions, starts, lens, table, rows = torch.split(
            self._memory[_NUM_COUNTS : ints.size], sizes
        )
        return StepInputs(
            token_ids=token_ids,
            positions=positions,
            query_starts=starts,
            context_lens=lens,
            block_table=table.view(num_seqs, width),
            logit_rows=rows,
            num_decodes=num_decodes,
            max_query_len=longest,
            max_context_len=context,
        )
