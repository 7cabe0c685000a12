"""Records through a shared-memory ring, and the doorbells that wake a sleeping end.

The ring itself, with its invariants, is C++ (csrc/ring/ring.h). Here is who rings whom:

- Each end of a channel has one doorbell, which its peer rings for two reasons: records for me, or
  room in the ring that I fill. So a ring is a hint; whoever wakes looks at both rings again.
- A doorbell is rung only after the other end announced that it sleeps or waits, and once for each
  announcement. Announcing is followed by one more look: that order is what loses no wake-up.
- A ring that comes too late (its sleeper timed out) only causes one turn too many. So a worker's
  own threads ring its doorbell as well, for reasons that no ring knows of (`wake`).
- No end ever waits for a peer that died: waits are bounded by the caller's timeout, and the death
  itself is seen by whoever owns the process.

Each record travels with a seal (seal.py). A receiver that has met a damaged record takes none of
the later ones either: its number in the row stays where it was.
"""

import itertools
import os
import time
from collections import deque
from typing import Protocol, final

import posix_ipc

from nodeserve._host import Ring
from nodeserve.errors import RecordTooLarge, RingError
from nodeserve.wire.seal import SEAL_BYTES, seal, unseal

FLUSH_RECORDS = 256
DRAIN_RECORDS = 4096


class Doorbell(Protocol):
    def ring(self) -> None: ...


@final
class SemaphoreDoorbell:
    """Wakes a process that sleeps in `wait`: a worker."""

    def __init__(self, semaphore: posix_ipc.Semaphore) -> None:
        self._semaphore = semaphore

    def ring(self) -> None:
        self._semaphore.release()

    def wait(self, timeout_s: float | None) -> bool:
        """True when it rang. Rings that came meanwhile are taken too: one look answers them all."""
        try:
            self._semaphore.acquire(timeout_s)
            while self._semaphore.value > 0:
                self._semaphore.acquire(0)
        except posix_ipc.BusyError:
            return False
        except posix_ipc.SignalError:  # a handler ran; the caller looks again
            return True
        return True


@final
class EventfdDoorbell:
    """Wakes an event loop that watches `fileno()`: the coordinator."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def ring(self) -> None:
        os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:  # it had not rung
            return


class Sender:
    """The producer's end."""

    def __init__(self, ring: Ring, peer: Doorbell) -> None:
        self._ring = ring
        self._peer = peer
        self._num_sealed = 0  # records that are in the ring, or on their way there

    def try_put(self, record: bytes) -> bool:
        """False: no room, nothing written."""
        return self._try_put(seal(record, self._num_sealed))

    def _try_put(self, sealed: bytes) -> bool:
        if not self._ring.put(sealed):
            return False
        self._num_sealed += 1
        self._wake_peer()
        return True

    def _wake_peer(self) -> None:
        if self._ring.consumer_to_wake():
            self._peer.ring()


@final
class BlockingSender(Sender):
    """A worker's end: may sleep on the worker's own doorbell until there is room."""

    def __init__(self, ring: Ring, peer: Doorbell, own: SemaphoreDoorbell) -> None:
        super().__init__(ring, peer)
        self._own = own

    def put(self, record: bytes, timeout_s: float | None = None) -> bool:
        """False, and nothing written, when there was no room for so long."""
        sealed = seal(record, self._num_sealed)
        if self._try_put(sealed):
            return True
        give_up_s = None if timeout_s is None else time.monotonic() + timeout_s
        while self._wait_for_room(len(sealed), give_up_s):
            if self._try_put(sealed):
                return True
        return False

    def _wait_for_room(self, record_bytes: int, give_up_s: float | None) -> bool:
        if not self._ring.arm_producer(record_bytes):
            return True
        left_s = None if give_up_s is None else give_up_s - time.monotonic()
        if left_s is None or left_s > 0:
            self._own.wait(left_s)
            return True
        self._ring.disarm_producer()
        return False

    def beat(self) -> None:
        """Count one turn of this worker's loop, for whoever asks whether it still turns."""
        self._ring.beat()


@final
class QueueingSender(Sender):
    """The coordinator's end: never sleeps; what has no room waits here, in order.

    While anything waits, the wait is announced in the ring, so the worker will ring for `flush`.
    """

    def __init__(self, ring: Ring, peer: Doorbell, max_queued: int) -> None:
        super().__init__(ring, peer)
        self._max_queued = max_queued
        self._queue: deque[bytes] = deque()  # sealed
        self.num_stalls = 0  # times that records began to wait for room

    @property
    def pending_bytes(self) -> int:
        """In the ring, not taken yet."""
        return self._ring.pending_bytes

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def max_record_bytes(self) -> int:
        """Larger ones are refused."""
        return self._ring.max_record_bytes - SEAL_BYTES

    def post(self, record: bytes) -> None:
        """Sent now or queued behind earlier ones. RingError when the queue is full as well."""
        sealed = seal(record, self._num_sealed)
        if not self._queue and self._try_put(sealed):
            return
        if len(record) > self.max_record_bytes:
            raise RecordTooLarge(f"a record of {len(record)} bytes cannot pass the ring")
        if len(self._queue) >= self._max_queued:
            raise RingError(f"the worker leaves {len(self._queue)} records unread; is it stuck?")
        self._queue.append(sealed)
        self._num_sealed += 1
        if len(self._queue) == 1 and not self.flush():
            self.num_stalls += 1

    def flush(self) -> bool:
        """Send what waits; False when some still does. Call it when the own doorbell has rung."""
        queue = self._queue
        while queue:
            num_put = self._ring.put_many(list(itertools.islice(queue, FLUSH_RECORDS)))
            if num_put:
                for _ in range(num_put):
                    queue.popleft()
                self._wake_peer()
            elif self._ring.arm_producer(len(queue[0])):
                return False
        return True


class Receiver:
    """The consumer's end."""

    def __init__(self, ring: Ring, peer: Doorbell) -> None:
        self._ring = ring
        self._peer = peer
        self._num_taken = 0
        self.num_stalls = 0  # times that the sender had to wait for room

    def drain(self, max_records: int = DRAIN_RECORDS) -> list[bytes]:
        """The records that are there, oldest first; never waits. RingError for a damaged one."""
        sealed = self._ring.drain(max_records)
        if not sealed:
            return sealed
        if self._ring.producer_to_wake():
            self.num_stalls += 1
            self._peer.ring()
        records = [unseal(one, number) for number, one in enumerate(sealed, self._num_taken)]
        self._num_taken += len(records)
        return records


@final
class BlockingReceiver(Receiver):
    """A worker's end: sleeps on the worker's own doorbell."""

    def __init__(self, ring: Ring, peer: Doorbell, own: SemaphoreDoorbell) -> None:
        super().__init__(ring, peer)
        self._own = own
        self._rings = [ring]  # whose records end a wait
        self._woken = False

    def also(self, other: Receiver) -> None:
        """Records for `other`, whose peer rings the same bell, end our waits as well."""
        self._rings.append(other._ring)

    def wait(self, timeout_s: float | None) -> bool:
        """Sleep until there may be records or `wake` was called (True), or the time is over
        (False)."""
        rang = self._woken or not all(ring.arm_consumer() for ring in self._rings)
        if not rang:
            rang = self._own.wait(timeout_s)
        for ring in self._rings:
            ring.disarm_consumer()
        self._woken = False
        return rang

    def wake(self) -> None:
        """End the wait that is under way, or else the next one; from any thread.

        The bell alone could be lost: a `put` that waits for room sleeps on it too.
        """
        self._woken = True  # before the bell: who hears it, or comes too late for it, sees this
        self._own.ring()


@final
class RungReceiver(Receiver):
    """The coordinator's end: called by its event loop each time the own doorbell has rung."""

    def __init__(self, ring: Ring, peer: Doorbell, own: EventfdDoorbell) -> None:
        super().__init__(ring, peer)
        self._own = own
        self._announce()

    def receive(self, max_records: int = DRAIN_RECORDS) -> list[bytes]:
        """The records that are there. If more are left or came meanwhile, the bell rings again."""
        self._own.clear()  # before the look: a ring after it is for records we may not see now
        records = self.drain(max_records)
        self._announce()
        return records

    def _announce(self) -> None:
        if not self._ring.arm_consumer():
            self._own.ring()

    @property
    def pending_bytes(self) -> int:
        """In the ring, not taken yet."""
        return self._ring.pending_bytes

    @property
    def beats(self) -> int:
        """Turns of the worker's loop so far; a number that stands still is a worker that does."""
        return self._ring.beats
