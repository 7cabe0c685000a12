"""A model without weights whose KV is real: it lives in the worker's pages and nowhere else.

Computing a token writes it and its position into the block that the scheduler gave it. Choosing the
next one reads every page of the sequence, so a page that is lost, stale, swapped or freed too early
changes the stream. `expected_stream` says what the stream must be.
"""

import json
import math
import mmap
import os
import signal
import struct
import time
from array import array
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, fields

from nodeserve.policy.batching import Batch, Sequence, Work
from nodeserve.wire.messages import pack_floats, pack_ids
from nodeserve.worker.contract import Computed, Logprobs, Sampled

VOCAB_SIZE = 997
PREFIX = "fake:"
_ENTRY = struct.Struct("=ii")  # token id, position
ENTRY_BYTES = _ENTRY.size


def next_token(token_ids: Tokens[int], vocab_size: int = VOCAB_SIZE) -> int:
    """Depends on every token and its place."""
    return sum(place * token for place, token in enumerate(token_ids, 1)) % vocab_size


def expected_stream(
    prompt: Tokens[int], num_tokens: int, vocab_size: int = VOCAB_SIZE
) -> list[int]:
    """What a request must get, whatever happens to it on its way."""
    total = sum(place * token for place, token in enumerate(prompt, 1))
    stream: list[int] = []
    for place in range(len(prompt) + 1, len(prompt) + num_tokens + 1):
        stream.append(total % vocab_size)
        total += place * stream[-1]
    return stream


@dataclass(frozen=True, slots=True)
class FakeSettings:
    """Knobs; travel as `WorkerSpec.model` = "fake:" + JSON. The defaults are a quick, honest model.

    `only_worker` limits crash and failure to one worker's index. `instant` skips the pages: tokens
    as fast as the loop turns, for benchmarks of everything else.
    """

    vocab_size: int = VOCAB_SIZE
    eos_token_ids: tuple[int, ...] = ()  # none: only max_tokens and stop_token_ids end a request
    step_s: float = 0.0  # a step takes at least step_s + tokens * token_s
    token_s: float = 0.0
    load_s: float = 0.0
    load_again_s: float = 0.0  # in every life but the first
    load_error: str | None = None
    weights: str | None = None  # a file that has to be there
    leaves_child: bool = False  # a process that has the worker's stderr, and outlives it
    crash_at_step: int | None = None  # SIGKILL itself, instead of computing this step
    fail_at_step: int | None = None  # raise
    only_worker: int | None = None
    instant: bool = False
    oversleeps: bool = False  # every wait has no end but the bell: as if the clock was set back
    overlaps: bool = False  # a device with a thread of its own: see tests/fakes/late_model.py
    max_blocks: int = 4096  # the pool's size where kv_memory would give more
    block_bytes: int = 0  # more than a block's tokens take, to have pages of a real model's size

    def block_bytes_for(self, block_size: int) -> int:
        return max(self.block_bytes, block_size * ENTRY_BYTES)

    @property
    def name(self) -> str:
        """What to give as the model's name."""
        default = FakeSettings()
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {k: v for k, v in values.items() if v != getattr(default, k)}
        return PREFIX + json.dumps(changed)

    @staticmethod
    def parse(name: str) -> "FakeSettings":
        """Settings from a model's name; a name that is not "fake:" plus JSON gives the defaults."""
        text = name.removeprefix(PREFIX) if name.startswith(PREFIX) else ""
        values = json.loads(text or "{}")
        values["eos_token_ids"] = tuple(values.get("eos_token_ids", ()))
        return FakeSettings(**values)


class FakeExecutor:
    """Stands where the model, its kernels and the sampler are."""

    def __init__(
        self, settings: FakeSettings, pool: mmap.mmap | bytearray, block_size: int, index: int = 0
    ) -> None:
        self.settings = settings
        self.num_steps = 0
        self.is_called = False  # by other ranks, which are the test
        self._pages = memoryview(pool)
        self._block_size = block_size
        self._block_bytes = settings.block_bytes_for(block_size)
        self._misbehaves = settings.only_worker in (None, index)

    @property
    def overlaps(self) -> bool:
        return False

    def opens_s(self) -> float:
        return -math.inf

    def called(self, departure: int) -> bool:
        return self.is_called

    def leave(self) -> bool:
        return False

    def on_done(self, wake: Callable[[], None]) -> None:
        pass

    def launch(self, batch: Batch) -> Computed:
        began = time.perf_counter()
        self._maybe_die()
        self.num_steps += 1
        choose = self._count_up if self.settings.instant else self._choose
        if not self.settings.instant:
            for work in batch.work:
                assert work.feed is None, "a step of its own has all its tokens at hand"
                self._compute(work)
        token_ids = [choose(sequence) for sequence in batch.sampled]
        sampled = Sampled(token_ids, logprobs_of(batch, token_ids))
        self._take_time(batch, began)
        return Computed(sampled)

    def _maybe_die(self) -> None:
        if self._misbehaves and self.num_steps == self.settings.crash_at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._misbehaves and self.num_steps == self.settings.fail_at_step:
            raise RuntimeError("the fake model was told to fail")

    def _take_time(self, batch: Batch, began: float) -> None:
        settings = self.settings
        num_tokens = batch.num_prefill_tokens + batch.num_decodes
        left_s = settings.step_s + num_tokens * settings.token_s - (time.perf_counter() - began)
        if left_s > 0:
            time.sleep(left_s)

    def _compute(self, work: Work) -> None:
        sequence = work.sequence
        for position in range(work.start, work.start + work.num_tokens):
            self._write(sequence.block_ids, position, sequence.token_ids[position])

    def _choose(self, sequence: Sequence) -> int:
        return self._next_of(sequence.block_ids, len(sequence.token_ids))

    def _count_up(self, sequence: Sequence) -> int:
        return (sequence.token_ids[-1] + 1) % self.settings.vocab_size

    def _write(self, block_ids: "array[int]", position: int, token_id: int) -> None:
        block_id = block_ids[position // self._block_size]
        offset = block_id * self._block_bytes + position % self._block_size * ENTRY_BYTES
        _ENTRY.pack_into(self._pages, offset, token_id, position)

    def _next_of(self, block_ids: "array[int]", num_tokens: int) -> int:
        kv: array[int] = array("i")
        for block_id in block_ids:
            start = block_id * self._block_bytes
            kv.frombytes(self._pages[start : start + self._block_size * ENTRY_BYTES])
        kv = kv[: 2 * num_tokens]
        total = sum((at + 1) * token for token, at in zip(kv[::2], kv[1::2], strict=True))
        return total % self.settings.vocab_size


def logprobs_of(batch: Batch, token_ids: list[int]) -> list[Logprobs] | None:
    """What a step says of those that asked: derived from the token, so a swapped row shows."""
    rows = []
    for row, sequence in enumerate(batch.sampled):
        count = sequence.sampling.logprobs
        if count is not None:
            top = [token_ids[row] + place for place in range(count)]
            values = [-0.5 - place for place in range(count)]
            rows.append(Logprobs(row, -0.5, pack_ids(top), pack_floats(values)))
    return rows or None
