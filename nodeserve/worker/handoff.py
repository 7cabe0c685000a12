"""The pull side of a handoff between two processes of one host.

A pool is block-major, so a block is one contiguous run of bytes in the peer's pool and in ours, and
a handoff is one copy per block straight from the peer's shared memory: nothing is packed, staged or
sent. The peer keeps the blocks pinned until the coordinator, told by our KvPulled, releases them.

The copies run in `poll`, between two steps, without the interpreter lock. A thread of their own
would not help: the cores a worker is pinned to are busy with the step.
"""

import mmap
import time
from collections import deque
from collections.abc import Callable

from nodeserve import _host
from nodeserve.wire.messages import unpack_ids
from nodeserve.worker.contract import Landed, Moved, Ticket
from nodeserve.worker.pages import map_peer
from nodeserve.worker.tickets import ids_of, unattached

SHARED_MEMORY = "shared memory"
BYTES_PER_POLL = 64 << 20  # about 4 ms: what running sequences may wait for a newcomer's pages


class HostTransfer:
    """Copies whole blocks between shared-memory pools."""

    def __init__(self, pool: mmap.mmap, block_bytes: int) -> None:
        self._pool = pool
        self._block_bytes = block_bytes
        self._peers: dict[int, mmap.mmap] = {}
        self._queue: deque[Ticket] = deque()

    @property
    def busy(self) -> bool:
        return bool(self._queue)

    def on_done(self, wake: Callable[[], None]) -> None:
        """Copies run in `poll`: nobody waits for one."""

    def attach(self, worker: int, fd: int, num_bytes: int, handle: bytes) -> None:
        """Map a peer's pool; again after the peer was restarted. `fd` stays open for that."""
        assert not handle, "pages of a GPU cannot be read by a CPU worker"
        peer = map_peer(fd, num_bytes)
        if old := self._peers.get(worker):
            old.close()
        self._peers[worker] = peer

    def detach(self, worker: int) -> list[int]:
        lost = [ticket.request_id for ticket in self._queue if ticket.source == worker]
        for request_id in lost:
            self.cancel(request_id)
        if peer := self._peers.pop(worker, None):
            peer.close()
        return lost

    def offer(self, request_id: int, block_ids: bytes) -> bytes:
        return block_ids  # our pool is shared memory: peers read it as it is

    def withdraw(self, request_id: int) -> None:
        pass

    def begin(self, ticket: Ticket) -> None:
        peer = self._peers.get(ticket.source)
        if peer is None:
            raise unattached(ticket)
        ids_of(ticket, len(peer) // self._block_bytes)
        self._queue.append(ticket)

    def poll(self) -> list[Moved]:
        landed: list[Moved] = []
        budget = BYTES_PER_POLL
        while self._queue and budget > 0:
            copied = self._copy(self._queue.popleft())
            landed.append(copied)
            budget -= copied.num_bytes
        return landed

    def cancel(self, request_id: int) -> None:
        for ticket in self._queue:
            if ticket.request_id == request_id:
                self._queue.remove(ticket)
                return

    def _copy(self, ticket: Ticket) -> Landed:
        began = time.perf_counter()
        source_ids = unpack_ids(ticket.source_ids)
        target_ids = unpack_ids(ticket.target_ids)
        _host.copy_blocks(
            self._pool, self._peers[ticket.source], self._block_bytes, target_ids, source_ids
        )
        num_bytes = len(source_ids) * self._block_bytes
        return Landed(ticket.request_id, num_bytes, time.perf_counter() - began)
