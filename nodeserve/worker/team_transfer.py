"""A leader's transfer: what it does with its part of the pages, its followers do with theirs.

A pull has landed, and pages are offered, when every member has said so. The first that fails fails
it for all. That a request is forgotten nobody answers: a follower carries it out before anything
that comes behind it, so the pages are free for what the leader launches next; what it may still
read of the source by then comes to nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nodeserve.errors import HandoffFailed, from_code
from nodeserve.wire import team as wire
from nodeserve.worker.contract import (
    CopyFailed,
    Landed,
    Moved,
    Offered,
    Source,
    Ticket,
    Transfer,
)
from nodeserve.worker.team import LeaderTeam


@dataclass(slots=True)
class Open:
    """A pull or an offer that some members have not answered."""

    number: int
    request_id: int
    source: int | None = None  # of a pull: the team that it is from
    answers: list[Moved] = field(default_factory=list)


class TeamTransfer:
    """What `contract.Transfer` describes, for the whole team; `own` is the leader's.
    `offers_at_once`: peers can read every member's pages as they are once the leader says so."""

    def __init__(self, own: Transfer, team: LeaderTeam, offers_at_once: bool) -> None:
        self._own = own
        self._team = team
        self._offers_at_once = offers_at_once
        self._open: dict[int, Open] = {}  # by request
        self._offered: set[int] = set()  # requests that followers offer pages of
        self._number = 0  # of the newest; answers to an earlier one of a request are too late

    @property
    def busy(self) -> bool:
        return self._own.busy

    def on_done(self, wake: Callable[[], None]) -> None:
        self._own.on_done(wake)  # followers ring our bell

    def attach(self, team: int, sources: Sequence[Source]) -> None:
        self._own.attach(team, sources)

    def detach(self, team: int) -> list[int]:
        self._own.detach(team)
        lost = [request_id for request_id, one in self._open.items() if one.source == team]
        for request_id in lost:
            self._forget(request_id)
        return lost

    def offer(self, request_id: int, block_ids: bytes) -> bytes | None:
        ids = self._own.offer(request_id, block_ids)
        if ids is not None and self._offers_at_once:
            return ids
        opened = self._begin(request_id)
        if ids is not None:
            opened.answers.append(Offered(request_id, ids))
        self._offered.add(request_id)
        self._team.post(wire.Offer(opened.number, request_id, block_ids))
        return None

    def withdraw(self, request_id: int) -> None:
        self._own.withdraw(request_id)
        if request_id in self._offered:
            self._forget(request_id)

    def begin(self, ticket: Ticket) -> None:
        self._own.begin(ticket)
        number = self._begin(ticket.request_id, ticket.source).number
        self._team.post(wire.Pull(number, *ticket))

    def cancel(self, request_id: int) -> None:
        self._own.cancel(request_id)
        self._forget(request_id)

    def poll(self) -> list[Moved]:
        """Also once a leader has nothing of its own to copy: answers come between its records."""
        moved = [self._count(one) for one in self._own.poll()]
        by_number = {one.number: one.request_id for one in self._open.values()}
        for answer in self._team.answers():
            if (request_id := by_number.get(answer.number)) is not None:
                moved.append(self._count(_moved(answer, request_id)))
        return [one for one in moved if one is not None]

    def _begin(self, request_id: int, source: int | None = None) -> Open:
        self._number += 1
        opened = self._open[request_id] = Open(self._number, request_id, source)
        return opened

    def _count(self, one: Moved) -> Moved | None:
        """The answer of all, if this was the last of them, or the first that failed."""
        opened = self._open.get(one.request_id)
        if opened is None:
            return None  # another member has failed
        if isinstance(one, CopyFailed):
            self.cancel(one.request_id)
            return one
        opened.answers.append(one)
        if len(opened.answers) <= self._team.num_followers:
            return None
        del self._open[one.request_id]
        return _whole(opened.answers)

    def _forget(self, request_id: int) -> None:
        """No member copies for it, or keeps pages for it, any more."""
        self._open.pop(request_id, None)
        self._offered.discard(request_id)
        self._team.post(wire.Forget(request_id))


def _moved(answer: wire.AboutPages, request_id: int) -> Moved:
    if isinstance(answer, wire.Landed):
        return Landed(request_id, answer.num_bytes, answer.seconds)
    if isinstance(answer, wire.Offered):
        return Offered(request_id, answer.block_ids)
    return CopyFailed(request_id, from_code(answer.code, answer.message))


def _whole(answers: list[Moved]) -> Moved:
    first = answers[0]
    landed = [one for one in answers if isinstance(one, Landed)]
    if landed:
        num_bytes = sum(one.num_bytes for one in landed)
        return Landed(first.request_id, num_bytes, max(one.seconds for one in landed))
    if any(one != first for one in answers):
        words = "the workers of an instance offer different pages"
        return CopyFailed(first.request_id, HandoffFailed(words))
    return first
