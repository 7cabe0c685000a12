"""A step's inputs on their way to the GPU: written on the host, copied there at once.

All arrays of a step lie one behind the other, in pinned memory and at the same places in one buffer
on the device, so a single copy brings them over. There is a pinned buffer for each step that may be
under way: one is written while the others are read. The device needs only one, since copies and
steps take turns there.

A captured step reads the same addresses every time. So steps of decodes alone have an arrangement
of their own, with small arrays at fixed places, and their block table, which travels as narrow as
the longest sequence allows, is spread over one of full width on the device.
"""

import struct
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
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


class Buffer:
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


class Counts(NamedTuple):
    """What a step's arrays do not say themselves."""

    size: int  # of the captured step that it is for; 0: none
    num_sampled: int
    num_tokens: int
    num_seqs: int
    num_rows: int
    width: int  # of its table
    num_decodes: int
    longest_query: int
    longest_context: int
    fed: bool  # some token is to come from the step before


_COUNTS = struct.Struct(f"={len(Counts._fields)}i")


@dataclass(frozen=True, slots=True)
class Staged:
    """A step that is written down. Its tensors are on the device and hold it after the copy."""

    counts: Counts
    buffer: Buffer
    source: torch.Tensor  # pinned
    target: torch.Tensor
    inputs: StepInputs
    feed: torch.Tensor | None  # [num_tokens] int32; None: every token is known
    spread: tuple[torch.Tensor, torch.Tensor] | None  # table as it travels, and where it belongs


class CudaStaging:
    """The pinned buffers and the device's. `num_steps`: how many may be under way."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        max_tokens: int,
        max_seqs: int,
        max_context_len: int,
        max_blocks: int,
        num_steps: int = 2,
    ) -> None:
        self._decodes, self._any = Fields(max_seqs, max_seqs), Fields(max_tokens, max_seqs)
        kinds = (self._decodes, self._any)
        size = max(fields.table for fields in kinds) + max_seqs * max_blocks
        self._buffers = [Buffer(runtime.pinned(size, torch.int32), kinds) for _ in range(num_steps)]
        self._device = torch.zeros(size, dtype=torch.int32, device=runtime.device)
        self._views = {fields: fields.views(self._device) for fields in kinds}
        self._table = torch.zeros((max_seqs, max_blocks), dtype=torch.int32, device=runtime.device)
        self._max_context_len = max_context_len
        self._turn = 0
        self.spare_block = 0  # that no request owns

    def build(self, batch: Batch) -> Staged:
        """Any step, at its own size."""
        buffer = self._next_buffer()
        arrays, feed = buffer.arrays(self._any)
        num_tokens, num_rows = arrays.fill(batch)
        num_seqs, width = len(batch.work), table_width(batch.work)
        self._write_table(buffer, self._any, batch, num_seqs, width)
        return self._staged(
            buffer,
            Counts(
                size=0,
                num_sampled=num_rows,
                num_tokens=num_tokens,
                num_seqs=num_seqs,
                num_rows=num_rows,
                width=width,
                num_decodes=batch.num_decodes,
                longest_query=longest_query(batch),
                longest_context=int(arrays.lens[:num_seqs].max(initial=0)),
                fed=_fill_feed(feed, batch, num_tokens),
            ),
        )

    def build_decodes(self, batch: Batch, size: int) -> Staged:
        """A step of decodes alone as the captured one of `size` reads it, filled up with rows of
        one token at place 0 of the spare block."""
        buffer = self._next_buffer()
        arrays, feed = buffer.arrays(self._decodes)
        count, width = len(batch.work), table_width(batch.work)
        arrays.fill(batch)
        _fill_feed(feed, batch, size)
        arrays.token_ids[count:size] = 0
        arrays.positions[count:size] = 0
        arrays.lens[count:size] = 1
        arrays.starts[count + 1 : size + 1] = range(count + 1, size + 1)
        arrays.rows[count:size] = range(count, size)
        self._write_table(buffer, self._decodes, batch, size, width)
        longest = self._max_context_len
        return self._staged(
            buffer, Counts(size, count, size, size, size, width, size, 1, longest, True)
        )

    def plan_of(self, staged: Staged) -> bytes:
        """A step as a follower reads it."""
        return _COUNTS.pack(*staged.counts) + staged.source.numpy().tobytes()

    def read(self, plan: bytes) -> Staged:
        """The step that a leader wrote down, whose staging is made for the same sizes."""
        counts = Counts(*_COUNTS.unpack_from(plan))
        buffer = self._next_buffer()
        ints = np.frombuffer(plan, np.int32, offset=_COUNTS.size)
        buffer.flat[: ints.size] = ints
        return self._staged(buffer, counts)

    def decode_inputs(self, size: int) -> tuple[StepInputs, torch.Tensor]:
        """The inputs and the feed of every captured step of `size`: the same each time."""
        longest = self._max_context_len
        counts = Counts(size, size, size, size, size, 0, size, 1, longest, True)
        inputs = self._inputs(self._decodes, counts, self._table[:size])
        return inputs, self._views[self._decodes][2][:size]

    def upload(self, staged: Staged) -> None:
        """To be part of submitted work: the one copy."""
        staged.target.copy_(staged.source, non_blocking=True)
        if staged.spread is not None:
            narrow, wide = staged.spread
            wide.copy_(narrow)

    # ---- parts

    def _next_buffer(self) -> Buffer:
        self._turn = (self._turn + 1) % len(self._buffers)
        buffer = self._buffers[self._turn]
        if buffer.reader is not None:  # the oldest step: over, unless nobody waited for it
            buffer.reader.synchronize()
            buffer.reader = None
        return buffer

    def _write_table(
        self, buffer: Buffer, fields: Fields, batch: Batch, num_rows: int, width: int
    ) -> None:
        """The table [num_rows, width] as it travels."""
        end = fields.table + num_rows * width
        table = buffer.flat[fields.table : end].reshape(num_rows, width)
        fill_table(table[: len(batch.work)], batch.work)
        table[len(batch.work) :] = self.spare_block

    def _inputs(self, fields: Fields, counts: Counts, table: torch.Tensor) -> StepInputs:
        token_ids, positions, _, starts, lens, rows = self._views[fields]
        return StepInputs(
            token_ids=token_ids[: counts.num_tokens],
            positions=positions[: counts.num_tokens],
            query_starts=starts[: counts.num_seqs + 1],
            context_lens=lens[: counts.num_seqs],
            block_table=table,
            logit_rows=rows[: counts.num_rows],
            num_decodes=counts.num_decodes,
            max_query_len=counts.longest_query,
            max_context_len=counts.longest_context,
        )

    def _staged(self, buffer: Buffer, counts: Counts) -> Staged:
        """What `buffer` holds, arranged as the counts say."""
        fields = self._decodes if counts.size else self._any
        used = fields.table + counts.num_seqs * counts.width
        narrow = self._device[fields.table : used].view(counts.num_seqs, counts.width)
        spread = None
        feed = self._views[fields][2][: counts.num_tokens] if counts.fed else None
        if counts.size:
            spread = narrow, self._table[: counts.size, : counts.width]
            inputs, feed = self.decode_inputs(counts.size)
        else:
            inputs = self._inputs(fields, counts, narrow)
        source, target = buffer.memory[:used], self._device[:used]
        return Staged(counts, buffer, source, target, inputs, feed, spread)


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
