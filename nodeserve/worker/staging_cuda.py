"""A step's inputs on their way to the GPU: written on the host, copied there at once.

All arrays of a step lie one behind the other, in pinned memory and at the same places in one buffer
on the device, so a single copy brings them over. There are two pinned buffers: one is written while
the other is read. The device needs only one, since copies and steps take turns there.

A captured step reads the same addresses every time. So steps of decodes alone have an arrangement
of their own, with small arrays at fixed places, and their block table, which travels as narrow as
the longest sequence allows, is spread over one of full width on the device.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch

from nodeserve.model.inputs import StepInputs
from nodeserve.policy.batching import Batch
from nodeserve.worker.gpu_runtime import Mark, Runtime
from nodeserve.worker.inputs import Arrays, Ints, fill_table, longest_query, table_width

_ALIGN = 32  # int32s: 128 bytes, what vector loads and copies like


class Fields:
    """Where each array begins, in int32s, and views of them in any memory."""

    def __init__(self, max_tokens: int, max_seqs: int) -> None:
        sizes = [max_tokens, max_tokens, max_tokens, max_seqs + 1, max_seqs, max_seqs]
        whole = [-(-size // _ALIGN) * _ALIGN for size in sizes]
        self._places = list(zip(accumulate(whole, initial=0), sizes, strict=False))
        self.table = sum(whole)  # where the block table begins

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """token_ids, positions, feed, starts, lens, rows in memory [n] int32"""
        return [memory[first : first + size] for first, size in self._places]


class Half:
    """One pinned buffer, seen in both arrangements."""

    def __init__(self, memory: torch.Tensor, kinds: tuple[Fields, ...]) -> None:
        self.memory = memory
        self.flat: Ints = memory.numpy()
        self.reader: Mark | None = None  # behind the copy that reads this buffer
        self._views: dict[Fields, tuple[Arrays, Ints]] = {}
        for fields in kinds:
            arrays = [view.numpy() for view in fields.views(memory)]
            token_ids, positions, feed, starts, lens, rows = arrays
            self._views[fields] = Arrays(token_ids, positions, starts, lens, rows), feed

    def arrays(self, fields: Fields) -> tuple[Arrays, Ints]:
        return self._views[fields]


@dataclass(frozen=True, slots=True)
class Staged:
    """A step that is written down. Its tensors are on the device and hold it after the copy."""

    half: Half
    source: torch.Tensor  # pinned
    target: torch.Tensor
    inputs: StepInputs
    feed: torch.Tensor | None  # [num_tokens] int32; None: every token is known
    spread: tuple[torch.Tensor, torch.Tensor] | None  # table as it travels, and where it belongs


class CudaStaging:
    """Both buffers and the device's."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        max_tokens: int,
        max_seqs: int,
        max_context_len: int,
        max_blocks: int,
    ) -> None:
        self._decodes, self._any = Fields(max_seqs, max_seqs), Fields(max_tokens, max_seqs)
        kinds = (self._decodes, self._any)
        size = max(fields.table for fields in kinds) + max_seqs * max_blocks
        self._halves = [Half(runtime.pinned(size, torch.int32), kinds) for _ in range(2)]
        self._device = torch.zeros(size, dtype=torch.int32, device=runtime.device)
        self._views = {fields: fields.views(self._device) for fields in kinds}
        self._table = torch.zeros((max_seqs, max_blocks), dtype=torch.int32, device=runtime.device)
        self._max_context_len = max_context_len
        self._turn = 0
        self.spare_block = 0  # that no request owns

    def build(self, batch: Batch) -> Staged:
        """Any step, at its own size."""
        fields, half = self._any, self._next_half()
        arrays, feed = half.arrays(fields)
        num_tokens, num_rows = arrays.fill(batch)
        fed = _fill_feed(feed, batch, num_tokens)
        num_seqs, width = len(batch.work), table_width(batch.work)
        table = self._write_table(half, fields, batch, num_seqs, width)
        longest = int(arrays.lens[:num_seqs].max())
        inputs = self._inputs(
            fields,
            num_tokens,
            num_seqs,
            num_rows,
            table,
            batch.num_decodes,
            longest_query(batch),
            longest,
        )
        feeds = self._views[fields][2][:num_tokens] if fed else None
        return self._staged(half, fields, num_seqs * width, inputs, feeds, None)

    def build_decodes(self, batch: Batch, size: int) -> Staged:
        """A step of decodes alone as the captured one of `size` reads it, filled up with rows of
        one token at place 0 of the spare block."""
        fields, half = self._decodes, self._next_half()
        arrays, feed = half.arrays(fields)
        count, width = len(batch.work), table_width(batch.work)
        arrays.fill(batch)
        _fill_feed(feed, batch, size)
        arrays.token_ids[count:size] = 0
        arrays.positions[count:size] = 0
        arrays.lens[count:size] = 1
        arrays.starts[count + 1 : size + 1] = range(count + 1, size + 1)
        arrays.rows[count:size] = range(count, size)
        table = self._write_table(half, fields, batch, size, width)
        inputs, feeds = self.decode_inputs(size)
        return self._staged(
            half, fields, size * width, inputs, feeds, (table, self._table[:size, :width])
        )

    def decode_inputs(self, size: int) -> tuple[StepInputs, torch.Tensor]:
        """The inputs and the feed of every captured step of `size`: the same each time."""
        inputs = self._inputs(
            self._decodes,
            size,
            size,
            size,
            self._table[:size],
            num_decodes=size,
            longest_query=1,
            longest_context=self._max_context_len,
        )
        return inputs, self._views[self._decodes][2][:size]

    def upload(self, staged: Staged) -> None:
        """To be part of submitted work: the one copy."""
        staged.target.copy_(staged.source, non_blocking=True)
        if staged.spread is not None:
            narrow, wide = staged.spread
            wide.copy_(narrow)

    # ---- parts

    def _next_half(self) -> Half:
        self._turn ^= 1
        half = self._halves[self._turn]
        if half.reader is not None:  # the step before the last: over, unless nobody waited for it
            half.reader.synchronize()
            half.reader = None
        return half

    def _write_table(
        self, half: Half, fields: Fields, batch: Batch, num_rows: int, width: int
    ) -> torch.Tensor:
        """The device's view [num_rows, width] of the table as it travels."""
        end = fields.table + num_rows * width
        table = half.flat[fields.table : end].reshape(num_rows, width)
        fill_table(table[: len(batch.work)], batch.work)
        table[len(batch.work) :] = self.spare_block
        return self._device[fields.table : end].view(num_rows, width)

    def _inputs(
        self,
        fields: Fields,
        num_tokens: int,
        num_seqs: int,
        num_rows: int,
        table: torch.Tensor,
        num_decodes: int,
        longest_query: int,
        longest_context: int,
    ) -> StepInputs:
        token_ids, positions, _, starts, lens, rows = self._views[fields]
        return StepInputs(
            token_ids=token_ids[:num_tokens],
            positions=positions[:num_tokens],
            query_starts=starts[: num_seqs + 1],
            context_lens=lens[:num_seqs],
            block_table=table,
            logit_rows=rows[:num_rows],
            num_decodes=num_decodes,
            max_query_len=longest_query,
            max_context_len=longest_context,
        )

    def _staged(
        self,
        half: Half,
        fields: Fields,
        table_size: int,
        inputs: StepInputs,
        feed: torch.Tensor | None,
        spread: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> Staged:
        used = fields.table + table_size
        return Staged(half, half.memory[:used], self._device[:used], inputs, feed, spread)


def _fill_feed(feed: Ints, batch: Batch, num_tokens: int) -> bool:
    """Where each token comes from among those just chosen, -1 where it is known; whether any is."""
    feed[:num_tokens] = -1
    fed = False
    for row in range(batch.num_decodes):
        place = batch.work[row].feed
        if place is not None:
            feed[row] = place
            fed = True
    return fed
