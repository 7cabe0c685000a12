"""From a batch to the tensors that the forward pass reads, without allocating them anew."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nodeserve.model.inputs import StepInputs
from nodeserve.policy.batching import Batch, Work

Ints = NDArray[np.int32]


class Arrays(NamedTuple):
    """What a step says of its tokens and sequences, to be filled for a batch."""

    token_ids: Ints  # [max_tokens]
    positions: Ints  # [max_tokens]
    starts: Ints  # [max_seqs + 1]
    lens: Ints  # [max_seqs]
    rows: Ints  # [max_seqs]

    def fill(self, batch: Batch) -> tuple[int, int]:
        """Write a batch; how many tokens and logit rows it has.

        A token that a launched step will choose is not known yet: a zero stands for it.
        """
        num_tokens = self._decodes(batch)
        num_tokens = self._prefills(batch, num_tokens)
        rows = [i for i, work in enumerate(batch.work) if work.samples]
        self.rows[: len(rows)] = self.starts[1:][rows] - 1
        return num_tokens, len(rows)

    def _decodes(self, batch: Batch) -> int:
        """One token each, all at once."""
        count = batch.num_decodes
        decodes = batch.work[:count]
        self.token_ids[:count] = [
            work.sequence.token_ids[work.start] if work.feed is None else 0 for work in decodes
        ]
        self.positions[:count] = [work.start for work in decodes]
        self.lens[:count] = self.positions[:count] + 1
        self.starts[: count + 1] = np.arange(count + 1)
        return count

    def _prefills(self, batch: Batch, at: int) -> int:
        for place in range(batch.num_decodes, len(batch.work)):
            sequence, start, num_tokens, _, _ = batch.work[place]
            end = at + num_tokens
            token_ids = np.frombuffer(sequence.token_ids, np.int32)
            self.token_ids[at:end] = token_ids[start : start + num_tokens]
            self.positions[at:end] = np.arange(start, start + num_tokens)
            self.lens[place] = start + num_tokens
            self.starts[place + 1] = end
            at = end
        return at


def table_width(work: list[Work]) -> int:
    """Blocks of the longest sequence."""
    return max((len(one.sequence.block_ids) for one in work), default=1)


def fill_table(table: Ints, work: list[Work]) -> None:
    """table [at least len(work), width] int32: each sequence's blocks, -1 behind them"""
    table.fill(-1)
    for row, one in enumerate(work):
        block_ids = one.sequence.block_ids
        table[row, : len(block_ids)] = np.frombuffer(block_ids, np.int32)


def longest_query(batch: Batch) -> int:
    return max((work.num_tokens for work in batch.work), default=0)


def _buffer(size: int) -> tuple[torch.Tensor, Ints]:
    """One memory, as the tensor that the model reads and the array that we write."""
    tensor = torch.zeros(size, dtype=torch.int32)
    return tensor, tensor.numpy()


class Staging:
    """Buffers for the largest step; what `build` returns is valid until the next `build`."""

    def __init__(self, max_tokens: int, max_seqs: int, max_blocks: int) -> None:
        self._token_ids, token_ids = _buffer(max_tokens)
        self._positions, positions = _buffer(max_tokens)
        self._starts, starts = _buffer(max_seqs + 1)
        self._lens, lens = _buffer(max_seqs)
        self._rows, rows = _buffer(max_seqs)
        self._table, self._np_table = _buffer(max_seqs * max_blocks)
        self._arrays = Arrays(token_ids, positions, starts, lens, rows)

    def build(self, batch: Batch) -> StepInputs:
        num_tokens, num_rows = self._arrays.fill(batch)
        num_seqs, width = len(batch.work), table_width(batch.work)
        size = num_seqs * width
        fill_table(self._np_table[:size].reshape(num_seqs, width), batch.work)
        return StepInputs(
            token_ids=self._token_ids[:num_tokens],
            positions=self._positions[:num_tokens],
            query_starts=self._starts[: num_seqs + 1],
            context_lens=self._lens[:num_seqs],
            block_table=self._table[:size].view(num_seqs, width),
            logit_rows=self._rows[:num_rows],
            num_decodes=batch.num_decodes,
            max_query_len=longest_query(batch),
            max_context_len=int(self._arrays.lens[:num_seqs].max(initial=0)),
        )
