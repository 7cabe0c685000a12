"""Whose pages this worker maps: of each team that it may pull from, those of the member that has
the same part of every block. A pull names that team's leader."""

from collections.abc import Iterable

from nodeserve.wire.messages import AttachPages
from nodeserve.worker.contract import Transfer

WHOLE = (0, 1, 0, 1)  # the place of a worker that has all of every block


class PeerSeats:
    """Between the coordinator, which tells of every worker's pages, and `transfer`. `place`: our
    own, [tp_rank, tp, pp_rank, pp]."""

    def __init__(self, transfer: Transfer, place: Iterable[int] = WHOLE) -> None:
        self._transfer = transfer
        self._place = list(place)
        self._leaders: dict[int, int] = {}  # of the workers whose pages are mapped

    def attach(self, message: AttachPages) -> None:
        """Map these pages if they are the ones to copy from."""
        worker, fd, num_bytes, handle, leader, place = message
        if place == self._place:
            self._transfer.attach(leader, fd, num_bytes, handle)
            self._leaders[worker] = leader

    def detach(self, worker: int) -> list[int]:
        """That worker has ended; requests whose pulls from its team were not over."""
        leader = self._leaders.pop(worker, None)
        return [] if leader is None else self._transfer.detach(leader)
