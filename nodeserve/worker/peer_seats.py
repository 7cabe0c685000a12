"""Whose pages this worker maps: of each team that it may pull from, those of the members that hold
parts of what it holds itself. A pull names that team's leader."""

from nodeserve.policy.copy_plan import CopyRun, PageShard, pulls, shards
from nodeserve.wire.messages import AttachPages
from nodeserve.worker.contract import Source, Transfer

Parts = dict[int, tuple[int, tuple[CopyRun, ...]]]
"""What is copied from a team, by the number of a member: bytes of its blocks, and the runs."""


class PeerSeats:
    """Between the coordinator, which tells of every worker's pages, and `transfer`.

    pages: our own part of every block. turn: where several workers hold the same, which of them we
    ask; they share the work if each reader has another one.
    """

    def __init__(self, transfer: Transfer, pages: PageShard, turn: int = 0) -> None:
        self._transfer = transfer
        self._pages = pages
        self._turn = turn
        self._parts: dict[tuple[int, int], Parts] = {}  # by the team's tp and pp
        self._teams: dict[int, dict[int, Source]] = {}  # by leader and member
        self._leaders: dict[int, int] = {}  # of the workers among these

    def attach(self, message: AttachPages) -> None:
        """Map a team's pages once all of it that something is copied from is known."""
        worker, fd, num_bytes, handle, leader, (tp_rank, tp, pp_rank, pp) = message
        parts, member = self._parts_of(tp, pp), pp_rank * tp + tp_rank
        if member not in parts:
            return
        self._leaders[worker] = leader
        team = self._teams.setdefault(leader, {})
        team[member] = Source(worker, fd, num_bytes, handle, *parts[member])
        if len(team) == len(parts):
            self._transfer.attach(leader, tuple(team.values()))

    def detach(self, worker: int) -> list[int]:
        """That worker has ended, and its team with it; requests whose pulls from there were not
        over."""
        leader = self._leaders.pop(worker, None)
        if leader is None or self._teams.pop(leader, None) is None:
            return []  # nothing was copied from it, or another member was heard of before
        return self._transfer.detach(leader)

    def _parts_of(self, tp: int, pp: int) -> Parts:
        """Of a team of this shape; the same for each such team."""
        if (tp, pp) not in self._parts:
            members = shards(self._pages.geometry, tp, pp)
            self._parts[tp, pp] = {
                pull.source_index: (members[pull.source_index].block_bytes, pull.runs)
                for pull in pulls(self._pages, members, self._turn)
            }
        return self._parts[tp, pp]
