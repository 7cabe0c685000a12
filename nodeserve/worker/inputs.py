"""From a batch to the tensors that the forward pass reads, without allocating them anew."""

import numpy as np
import torch
from numpy.typing import NDArray

from nodeserve.model.inputs import StepInputs
from nodeserve.policy.batching import Batch

Ints = NDArray[np.int32]


def _buffer(size: int) -> tuple[torch.Tensor, Ints]:
    """One memory, as the tensor that the model reads and the array that we write."""
    tensor = torch.zeros(size, dtype=torch.int32)
    return tensor, tensor.numpy()


class Staging:
    """Buffers for the largest step; what `build` returns is valid until the next `build`."""

    def __init__(self, max_tokens: int, max_seqs: int, max_blocks: int) -> None:
        self._token_ids, self._np_token_ids = _buffer(max_tokens)
        self._positions, self._np_positions = _buffer(max_tokens)
        self._starts, self._np_starts = _buffer(max_seqs + 1)
        self._lens, self._np_lens = _buffer(max_seqs)
        self._table, self._np_table = _buffer(max_seqs * max_blocks)
        self._rows, self._np_rows = _buffer(max_seqs)

    def build(self, batch: Batch) -> StepInputs:
        num_tokens = self._decodes(batch)
        num_tokens = self._prefills(batch, num_tokens)
        num_seqs = len(batch.work)
        rows = [i for i, work in enumerate(batch.work) if work.samples]
        self._np_rows[: len(rows)] = self._np_starts[1:][rows] - 1
        return StepInputs(
            token_ids=self._token_ids[:num_tokens],
            positions=self._positions[:num_tokens],
            query_starts=self._starts[: num_seqs + 1],
            context_lens=self._lens[:num_seqs],
            block_table=self._block_table(batch),
            logit_rows=self._rows[: len(rows)],
            num_decodes=batch.num_decodes,
            max_query_len=max(work.num_tokens for work in batch.work),
            max_context_len=int(self._np_lens[:num_seqs].max()),
        )

    def _decodes(self, batch: Batch) -> int:
        """One token each, all at once."""
        count = batch.num_decodes
        decodes = batch.work[:count]
        self._np_token_ids[:count] = [work.sequence.token_ids[work.start] for work in decodes]
        self._np_positions[:count] = [work.start for work in decodes]
        self._np_lens[:count] = self._np_positions[:count] + 1
        self._np_starts[: count + 1] = np.arange(count + 1)
        return count

    def _prefills(self, batch: Batch, at: int) -> int:
        for place in range(batch.num_decodes, len(batch.work)):
            sequence, start, num_tokens, _, _ = batch.work[place]
            end = at + num_tokens
            token_ids = np.frombuffer(sequence.token_ids, np.int32)
            self._np_token_ids[at:end] = token_ids[start : start + num_tokens]
            self._np_positions[at:end] = np.arange(start, start + num_tokens)
            self._np_lens[place] = start + num_tokens
            self._np_starts[place + 1] = end
            at = end
        return at

    def _block_table(self, batch: Batch) -> torch.Tensor:
        tables = [work.sequence.block_ids for work in batch.work]
        width = max(map(len, tables))
        size = len(tables) * width
        table = self._np_table[:size].reshape(len(tables), width)
        table.fill(-1)
        for row, block_ids in enumerate(tables):
            table[row, : len(block_ids)] = np.frombuffer(block_ids, np.int32)
        return self._table[:size].view(len(tables), width)
