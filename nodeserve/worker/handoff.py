"""The pull side of a handoff between two processes of one host.

A pool is block-major, so a block is one contiguous run of bytes in the peer's pool and in ours. A
handoff between equal shapes is one copy per block straight from the peer's shared memory, between
others one for each run of the plan: nothing is packed, staged or sent. The peers keep the blocks
pinned until the coordinator, told by our KvPulled, releases them.

The copies run in `poll`, between two steps, without the interpreter lock. A thread of their own
would not help: the cores a worker is pinned to are busy with the step.
"""

import mmap
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nodeserve import _host
from nodeserve.worker.contract import Landed, Moved, Source, Ticket
from nodeserve.worker.pages import map_peer
from nodeserve.worker.tickets import ids_of, unattached

SHARED_MEMORY = "shared memory"
BYTES_PER_POLL = 64 << 20  # about 4 ms: what running sequences may wait for a newcomer's pages


@dataclass(frozen=True, slots=True)
class _Pull:
    ticket: Ticket
    source_ids: "array[int]"
    target_ids: "array[int]"


class HostTransfer:
    """Copies parts of blocks between shared-memory pools; `block_bytes`: of a block in ours."""

    def __init__(self, pool: mmap.mmap, block_bytes: int) -> None:
        self._pool = pool
        self._block_bytes = block_bytes
        self._teams: dict[int, list[tuple[mmap.mmap, Source]]] = {}
        self._queue: deque[_Pull] = deque()

    @property
    def busy(self) -> bool:
        return bool(self._queue)

    def on_done(self, wake: Callable[[], None]) -> None:
        """Copies run in `poll`: nobody waits for one."""

    def attach(self, team: int, sources: Sequence[Source]) -> None:
        """Map a team's pools; again after it was started again. Their `fd`s stay open for that."""
        assert not any(one.handle for one in sources), "a CPU worker cannot read a GPU's pages"
        mapped = [(map_peer(one.fd, one.num_bytes), one) for one in sources]
        self._unmap(team)
        self._teams[team] = mapped

    def detach(self, team: int) -> list[int]:
        lost = [one.ticket.request_id for one in self._queue if one.ticket.source == team]
        for request_id in lost:
            self.cancel(request_id)
        self._unmap(team)
        return lost

    def _unmap(self, team: int) -> None:
        for peer, _ in self._teams.pop(team, ()):
            peer.close()

    def offer(self, request_id: int, block_ids: bytes) -> bytes:
        return block_ids  # our pool is shared memory: peers read it as it is

    def withdraw(self, request_id: int) -> None:
        pass

    def begin(self, ticket: Ticket) -> None:
        team = self._teams.get(ticket.source)
        if team is None:
            raise unattached(ticket)
        num_blocks = min(len(peer) // source.block_bytes for peer, source in team)
        self._queue.append(_Pull(ticket, *ids_of(ticket, num_blocks)))

    def poll(self) -> list[Moved]:
        landed: list[Moved] = []
        budget = BYTES_PER_POLL
        while self._queue and budget > 0:
            copied = self._copy(self._queue.popleft())
            landed.append(copied)
            budget -= copied.num_bytes
        return landed

    def cancel(self, request_id: int) -> None:
        for pull in self._queue:
            if pull.ticket.request_id == request_id:
                self._queue.remove(pull)
                return

    def _copy(self, pull: _Pull) -> Landed:
        began = time.perf_counter()
        for peer, source in self._teams[pull.ticket.source]:
            _host.copy_blocks(
                self._pool,
                peer,
                self._block_bytes,
                source.block_bytes,
                source.runs,
                pull.target_ids,
                pull.source_ids,
            )
        num_bytes = len(pull.source_ids) * self._block_bytes
        return Landed(pull.ticket.request_id, num_bytes, time.perf_counter() - began)
