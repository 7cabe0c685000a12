"""A handoff between simulated devices: real pages, tiny ones, in the time that true ones take.

What a simulated model is made of nobody says. Its pages are cut as those of 8 layers with 8 KV
heads would be, of which each has a byte of every block, and K and V are one.
"""

import mmap
import time
from collections.abc import Callable

from nodeserve.policy.copy_plan import PageGeometry
from nodeserve.worker.alarm import Alarm
from nodeserve.worker.contract import Landed, Moved, Ticket
from nodeserve.worker.handoff import HostTransfer

GEOMETRY = PageGeometry(8, 8, block_size=1, head_dim=1, value_bytes=1, parts=1)


class SimTransfer(HostTransfer):
    """Copies land one after the other, as over one link into this device, and take as long as the
    link out of that device of the other team which sends its readers most.

    block_bytes: of our part of a block in the pool; true_block_bytes: on the imitated device. Each
    device has a link that takes `bytes_per_s`.
    """

    def __init__(
        self,
        pool: mmap.mmap,
        block_bytes: int,
        true_block_bytes: int,
        bytes_per_s: float,
        alarm: Alarm,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(pool, block_bytes)
        self._true_block_bytes = true_block_bytes
        self._bytes_per_s = bytes_per_s
        self._alarm = alarm
        self._clock = clock
        self._due_s: dict[int, float] = {}  # of each pull under way, by request id
        self._free_s = 0.0  # when the link has nothing more to carry

    @property
    def busy(self) -> bool:
        return False  # the alarm tells of each end

    def begin(self, ticket: Ticket) -> None:
        super().begin(ticket)
        self._free_s = max(self._free_s, self._clock()) + self._seconds(ticket)
        self._due_s[ticket.request_id] = self._free_s
        self._alarm.wake_at(self._free_s)

    def poll(self) -> list[Moved]:
        landed: list[Moved] = []
        while self._queue and self._due_s[self._queue[0].ticket.request_id] <= self._clock():
            pull = self._queue.popleft()
            ticket = pull.ticket
            del self._due_s[ticket.request_id]
            self._copy(pull)
            landed.append(Landed(ticket.request_id, self._num_bytes(ticket), self._seconds(ticket)))
        return landed

    def cancel(self, request_id: int) -> None:
        super().cancel(request_id)
        self._due_s.pop(request_id, None)

    def _num_bytes(self, ticket: Ticket) -> int:
        return len(ticket.source_ids) // 4 * self._true_block_bytes

    def _seconds(self, ticket: Ticket) -> float:
        sent = max(source.block_bytes for _, source in self._teams[ticket.source])
        return self._num_bytes(ticket) * max(1.0, sent / self._block_bytes) / self._bytes_per_s
