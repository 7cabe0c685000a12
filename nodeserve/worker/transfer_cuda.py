"""Handoff between GPUs: pulls from peers beside the steps, and our own pages offered to peers.

A pull is one launch on a copy stream. It does not wait for our steps: the scheduler gives out a
block only when no launched step writes to it any more, and runs the request once the pages are
here. It does wait, on the device, for the peer's word that the pages are complete.
"""

from collections.abc import Callable
from typing import Any

from nodeserve.errors import ConfigError
from nodeserve.worker.contract import Moved, Ticket
from nodeserve.worker.offers import Offers
from nodeserve.worker.page_copies import Blocks, PageCopies
from nodeserve.worker.peers import Peer, open_device_pages, open_host_pages
from nodeserve.worker.tickets import ids_of, unattached
from nodeserve.worker.watcher import Watcher


class CudaTransfer:
    """What `contract.Transfer` asks for."""

    def __init__(
        self,
        cuda: Any,
        device: int,
        pool: Blocks,
        block_bytes: int,
        pulls: PageCopies,
        offers: Offers,
        watcher: Watcher,
    ) -> None:
        self._cuda = cuda
        self._device = device
        self._pool = pool
        self._block_bytes = block_bytes
        self._pulls = pulls
        self._offers = offers
        self._watcher = watcher
        self._peers: dict[int, Peer] = {}
        self._sources: dict[int, int] = {}  # of the pulls under way, by request
        self.pages_bytes = offers.pages_bytes  # what a peer maps
        self.pages_handle = offers.pages_handle

    def on_done(self, wake: Callable[[], None]) -> None:
        """Call `wake`, from any thread, whenever `poll` may have news."""
        self._watcher.start(wake)

    @property
    def busy(self) -> bool:
        return self._offers.busy

    def attach(self, worker: int, fd: int, num_bytes: int, handle: bytes) -> None:
        """Open a peer's pages; again after the peer was restarted. `fd` stays open for that."""
        if old := self._peers.pop(worker, None):
            self._pulls.settle()
            old.close()
        try:
            self._peers[worker] = self._open(fd, num_bytes, handle)
        except self._cuda.CudaError as problem:
            advice = "; --handoff host does without" if handle else ""
            raise ConfigError(
                f"the pages of worker {worker} cannot be opened here: {problem}{advice}"
            ) from None

    def detach(self, worker: int) -> list[int]:
        lost = [request_id for request_id, source in self._sources.items() if source == worker]
        for request_id in lost:
            self._pulls.drop(request_id)
            del self._sources[request_id]
        if peer := self._peers.pop(worker, None):
            peer.close()
        return lost

    def _open(self, fd: int, num_bytes: int, handle: bytes) -> Peer:
        if handle:
            return open_device_pages(self._cuda, self._device, handle, num_bytes)
        return open_host_pages(self._cuda, self._device, fd, num_bytes)

    def offer(self, request_id: int, block_ids: bytes) -> bytes | None:
        return self._offers.offer(request_id, block_ids)

    def withdraw(self, request_id: int) -> None:
        self._offers.withdraw(request_id)

    def begin(self, ticket: Ticket) -> None:
        peer = self._peers.get(ticket.source)
        if peer is None:
            raise unattached(ticket)
        source_ids, target_ids = ids_of(ticket, peer.num_bytes // self._block_bytes)
        source = Blocks(peer.address, peer.num_bytes)
        self._pulls.begin(
            ticket.request_id, self._pool, source, target_ids, source_ids, after=peer.written
        )
        self._sources[ticket.request_id] = ticket.source

    def poll(self) -> list[Moved]:
        pulled = self._pulls.poll()
        for moved in pulled:
            del self._sources[moved.request_id]
        return [*pulled, *self._offers.poll()]

    def cancel(self, request_id: int) -> None:
        self._sources.pop(request_id, None)
        self._pulls.drop(request_id)
        self._offers.withdraw(request_id)
