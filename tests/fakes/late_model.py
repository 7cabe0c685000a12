"""The fake model on a device that computes later than it is told, as a GPU does.

A launch only takes down what a device would be given: block ids and the tokens that the host knows.
Pages are written and read when the step's turn comes, so a block that was freed too early, or an
input token that was not there yet, changes the stream. An input token that a work takes by `feed`
comes from the results of the step before.

`LateExecutor` computes when a test says so; `ThreadedExecutor` has a thread for a device.
"""

import mmap
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

from nodeserve.policy.batching import Batch, Work
from nodeserve.worker.contract import Failure, Ran, Sampled
from tests.fakes.model import FakeExecutor, FakeSettings, logprobs_of
from tests.patience import PATIENCE_S


@dataclass(frozen=True, slots=True)
class Row:
    """One work, as a device sees it."""

    block_ids: "array[int]"
    start: int
    token_ids: "array[int]"  # empty: the one token is `feed` of the step before
    feed: int | None
    samples: bool

    @property
    def end(self) -> int:
        return self.start + (len(self.token_ids) or 1)


def row_of(work: Work) -> Row:
    known = work.sequence.token_ids[work.start : work.start + work.num_tokens]
    assert len(known) == (work.num_tokens if work.feed is None else 0)
    assert work.feed is None or work.num_tokens == 1
    return Row(work.sequence.block_ids[:], work.start, known, work.feed, work.samples)


class LateFlight:
    """A launched step; over when the device says so."""

    def __init__(self, batch: Batch, before: "LateFlight | None") -> None:
        self.batch = batch
        self.rows = [row_of(work) for work in batch.work]
        self.before = before
        self.token_ids: list[int] = []
        self.problem: Exception | None = None
        self.ran: Ran | None = None  # a test's word on when it ran
        self.failed: tuple[Failure, ...] = ()  # and on who cannot go on
        self._over = threading.Event()

    def done(self) -> bool:
        return self._over.is_set()

    def result(self) -> Sampled:
        assert self._over.wait(PATIENCE_S), "nobody computes this step"
        if self.problem is not None:
            raise self.problem
        logprobs = logprobs_of(self.batch, self.token_ids)
        return Sampled(self.token_ids, logprobs, self.ran, self.failed)

    def end(self, token_ids: list[int], problem: Exception | None = None) -> None:
        self.token_ids, self.problem, self.before = token_ids, problem, None
        self._over.set()


class LateExecutor(FakeExecutor):
    """`compute_one` is the device: it takes the oldest launched step and computes it."""

    def __init__(
        self, settings: FakeSettings, pool: mmap.mmap | bytearray, block_size: int, index: int = 0
    ) -> None:
        super().__init__(settings, pool, block_size, index)
        self.on_the_way: deque[LateFlight] = deque()
        self._last: LateFlight | None = None
        self._wake: Callable[[], None] = lambda: None

    @property
    def overlaps(self) -> bool:
        return True

    def on_done(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def launch(self, batch: Batch) -> LateFlight:  # type: ignore[override]
        self._maybe_die()
        self.num_steps += 1
        self._last = LateFlight(batch, self._last)
        self.on_the_way.append(self._last)
        return self._last

    def compute_one(self) -> None:
        flight = self.on_the_way[0]
        try:
            flight.end(self._run(flight))
        except Exception as problem:  # noqa: BLE001 it belongs to whoever asks for the result
            flight.end([], problem)
        self.on_the_way.popleft()
        self._wake()

    def _run(self, flight: LateFlight) -> list[int]:
        token_ids = []
        for row in flight.rows:
            inputs = row.token_ids
            if row.feed is not None:
                assert flight.before is not None
                inputs = array("i", [flight.before.token_ids[row.feed]])
            if not self.settings.instant:
                for place, token_id in enumerate(inputs):
                    self._write(row.block_ids, row.start + place, token_id)
            if row.samples:
                token_ids.append(self._sample(row, inputs[-1]))
        return token_ids

    def _sample(self, row: Row, last: int) -> int:
        if self.settings.instant:
            return (last + 1) % self.settings.vocab_size
        return self._next_of(row.block_ids, row.end)


class ThreadedExecutor(LateExecutor):
    """Steps run one after the other in a thread, each for as long as the settings say."""

    def __init__(
        self, settings: FakeSettings, pool: mmap.mmap | bytearray, block_size: int, index: int = 0
    ) -> None:
        super().__init__(settings, pool, block_size, index)
        self._orders: SimpleQueue[LateFlight] = SimpleQueue()
        threading.Thread(target=self._device, name="fake device", daemon=True).start()

    def launch(self, batch: Batch) -> LateFlight:  # type: ignore[override]
        flight = super().launch(batch)
        self._orders.put(flight)
        return flight

    def _device(self) -> None:
        while True:
            flight = self._orders.get()
            self._take_time(flight.batch, time.perf_counter())
            self.compute_one()
