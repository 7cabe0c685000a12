"""Handoff between GPUs: pulls from peers beside the steps, and our own pages offered to peers.

A pull is one launch on a copy stream for each worker that has a part of ours. It does not wait for
our steps: the scheduler gives out a block only when no launched step writes to it any more, and
runs the request once the pages are here. It does wait, on the device, for the peers' word that the
pages are complete.
"""

from collections.abc import Callable, Sequence
from typing import Any

from nodeserve.errors import ConfigError
from nodeserve.worker.contract import Moved, Source, Ticket
from nodeserve.worker.offers import Offers
from nodeserve.worker.page_copies import Blocks, PageCopies, Part, as_runs
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
        pulls: PageCopies,
        offers: Offers,
        watcher: Watcher,
    ) -> None:
        self._cuda = cuda
        self._device = device
        self._pool = pool
        self._pulls = pulls
        self._offers = offers
        self._watcher = watcher
        self._teams: dict[int, list[tuple[Peer, Part]]] = {}
        self._sources: dict[int, int] = {}  # teams of the pulls under way, by request
        self.pages_bytes = offers.pages_bytes  # what a peer maps
        self.pages_handle = offers.pages_handle

    def on_done(self, wake: Callable[[], None]) -> None:
        """Call `wake`, from any thread, whenever `poll` may have news."""
        self._watcher.start(wake)

    @property
    def busy(self) -> bool:
        return self._offers.busy

    def attach(self, team: int, sources: Sequence[Source]) -> None:
        """Open a team's pages; again after it was started again. Their `fd`s stay open for that."""
        if team in self._teams:
            self._pulls.settle()
            self._close(team)
        self._teams[team] = self._open_all(sources)

    def detach(self, team: int) -> list[int]:
        lost = [request_id for request_id, source in self._sources.items() if source == team]
        for request_id in lost:
            self._pulls.drop(request_id)
            del self._sources[request_id]
        self._close(team)
        return lost

    def _close(self, team: int) -> None:
        for peer, _ in self._teams.pop(team, ()):
            peer.close()

    def _open_all(self, sources: Sequence[Source]) -> list[tuple[Peer, Part]]:
        opened: list[tuple[Peer, Part]] = []
        for source in sources:
            try:
                opened.append(self._open(source))
            except Exception as problem:
                for peer, _ in opened:
                    peer.close()
                if not isinstance(problem, self._cuda.CudaError):
                    raise
                advice = "; --handoff host does without" if source.handle else ""
                raise ConfigError(
                    f"the pages of worker {source.worker} cannot be opened here: {problem}{advice}"
                ) from None
        return opened

    def _open(self, source: Source) -> tuple[Peer, Part]:
        cuda, device, num_bytes = self._cuda, self._device, source.num_bytes
        if source.handle:
            peer = open_device_pages(cuda, device, source.handle, num_bytes)
        else:
            peer = open_host_pages(cuda, device, source.fd, num_bytes)
        blocks = Blocks(peer.address, num_bytes // source.block_bytes, source.block_bytes)
        return peer, Part(blocks, as_runs(source.runs), peer.written)

    def offer(self, request_id: int, block_ids: bytes) -> bytes | None:
        return self._offers.offer(request_id, block_ids)

    def withdraw(self, request_id: int) -> None:
        self._offers.withdraw(request_id)

    def begin(self, ticket: Ticket) -> None:
        parts = [part for _, part in self._teams.get(ticket.source, ())]
        if not parts:
            raise unattached(ticket)
        source_ids, target_ids = ids_of(ticket, min(part.source.num_blocks for part in parts))
        self._pulls.begin(ticket.request_id, self._pool, parts, target_ids, source_ids)
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
