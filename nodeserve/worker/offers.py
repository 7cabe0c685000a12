"""How a GPU worker lets peers read the pages of a prefilled request.

Directly, where peers' GPUs read ours: the blocks stay where they are. Or through slots of pinned
shared memory: then the copy out is part of the offer, and what finds no slot waits for one.

The step that wrote the pages is over when they are offered: the loop has its tokens.
"""

import enum
import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from nodeserve.errors import HandoffFailed
from nodeserve.wire.messages import pack_ids, unpack_ids
from nodeserve.worker.contract import CopyFailed, Offered
from nodeserve.worker.page_copies import Blocks, PageCopies, Part, whole_block


class Offers(Protocol):
    """The part of `contract.Transfer` that lets pages go."""

    pages_bytes: int  # what a peer maps
    pages_handle: bytes

    def offer(self, request_id: int, block_ids: bytes) -> bytes | None: ...

    def withdraw(self, request_id: int) -> None:
        """Nobody reads the request's pages any more; unknown ids are no mistake."""

    def poll(self) -> list[Offered | CopyFailed]: ...

    @property
    def busy(self) -> bool:
        """Whether `poll` has an answer that nothing wakes the loop for."""


class NoOffers:
    """Nobody pulls from this worker."""

    pages_bytes = 0
    pages_handle = b""
    busy = False

    def offer(self, request_id: int, block_ids: bytes) -> bytes:
        raise HandoffFailed("this worker was not started for prefill: its pages have no way out")

    def withdraw(self, request_id: int) -> None:
        pass

    def poll(self) -> list[Offered | CopyFailed]:
        return []


class DirectOffers:
    """Peers read our pool.

    `written` is an event that peers' copies wait for: it orders their reads behind our writes. It
    lies on a stream with nothing else in it: on the compute stream it would make them wait for the
    steps that came after as well. It is over before anybody hears of the pages, so a worker that
    dies leaves no peer waiting for an event that never comes.
    """

    def __init__(self, written: Any, stream: Any, pages_bytes: int, pages_handle: bytes) -> None:
        self._written = written
        self._stream = stream
        self.pages_bytes = pages_bytes
        self.pages_handle = pages_handle

    @property
    def busy(self) -> bool:
        return False

    def offer(self, request_id: int, block_ids: bytes) -> bytes:
        self._written.record(self._stream.handle)
        self._written.synchronize()
        return block_ids

    def withdraw(self, request_id: int) -> None:
        """The blocks are the scheduler's to free."""

    def poll(self) -> list[Offered | CopyFailed]:
        return []


class _State(enum.Enum):
    QUEUED = enum.auto()  # waits for slots
    COPYING = enum.auto()
    OFFERED = enum.auto()


@dataclass(slots=True)
class _Offer:
    request_id: int
    block_ids: list[int]  # ours, on the device
    slots: list[int] = field(default_factory=list)
    state: _State = _State.QUEUED


class HostOffers:
    """Peers read slots of shared memory."""

    def __init__(
        self,
        copies: PageCopies,
        pool: Blocks,
        segment: Blocks,
        pages_bytes: int,
        keep: object = None,
    ) -> None:
        """pool: our pages on the device; segment: pinned memory, a slot is a block of it; keep:
        what must live as long as the segment is used"""
        self._keep = keep
        self._copies = copies
        self._parts = [Part(pool, whole_block(pool.block_bytes))]
        self._segment = segment
        # A heap: members of a team must choose the same slots, also after one of them has lost an
        # offer that others gave back later.
        self._free = list(range(segment.num_blocks))
        self._offers: dict[int, _Offer] = {}
        self._queue: deque[_Offer] = deque()
        self._failed: list[CopyFailed] = []
        self.pages_bytes = pages_bytes
        self.pages_handle = b""

    @property
    def busy(self) -> bool:
        return bool(self._failed)

    def offer(self, request_id: int, block_ids: bytes) -> None:
        offer = _Offer(request_id, unpack_ids(block_ids).tolist())
        assert len(offer.block_ids) <= self._segment.num_blocks, "the segment holds a full context"
        self._offers[request_id] = offer
        self._queue.append(offer)
        self._start_queued()

    def withdraw(self, request_id: int) -> None:
        offer = self._offers.pop(request_id, None)
        if offer is None:
            return
        match offer.state:
            case _State.QUEUED:
                self._queue.remove(offer)
            case _State.COPYING:
                self._copies.drop(request_id)
        self._give_back(offer)
        self._start_queued()

    def poll(self) -> list[Offered | CopyFailed]:
        """Who waits for slots waits for a `withdraw`: first come, first served."""
        news: list[Offered | CopyFailed] = [*self._failed]
        self._failed.clear()
        for copied in self._copies.poll():
            if isinstance(copied, CopyFailed):
                self._lose(copied.request_id)
                news.append(copied)
            else:
                offer = self._offers[copied.request_id]
                offer.state = _State.OFFERED
                news.append(Offered(copied.request_id, pack_ids(offer.slots)))
        self._start_queued()  # a lost one may have left room
        return news

    def _start_queued(self) -> None:
        while self._queue and len(self._queue[0].block_ids) <= len(self._free):
            offer = self._queue.popleft()
            offer.slots = [heapq.heappop(self._free) for _ in offer.block_ids]
            offer.state = _State.COPYING
            try:
                self._copies.begin(
                    offer.request_id, self._segment, self._parts, offer.slots, offer.block_ids
                )
            except HandoffFailed as problem:
                self._failed.append(CopyFailed(offer.request_id, problem))
                self._lose(offer.request_id)

    def _lose(self, request_id: int) -> None:
        """Its slots are free again: no copy writes there any more."""
        self._give_back(self._offers.pop(request_id))

    def _give_back(self, offer: _Offer) -> None:
        for slot in offer.slots:
            heapq.heappush(self._free, slot)
