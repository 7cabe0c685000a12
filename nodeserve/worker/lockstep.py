"""Passes that all ranks of an instance run together, each rank in a process of its own.

A pass begins when the last rank has entered it and ends for all at the same time. Whoever enters
first calls the others; a rank without work answers with an empty batch. So nobody waits for a rank
that has nothing to do, and an instance without work runs no pass.

The ranks share a board (memory that the coordinator made, nameless and zeroed) and a bell each. The
board is read and written under a file lock that the kernel gives back when its holder dies; then
the others wait for a rank that never comes, until the coordinator ends them.

A rank that is told to stop closes the board: a pass that gathers then still runs, with all of them,
and none begins after it. Without that some would stop while others wait for them in a pass.
"""

import contextlib
import fcntl
import math
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from nodeserve.errors import ShuttingDown
from nodeserve.policy.cost import IDLE, RankWork
from nodeserve.policy.pipeline import Pipeline
from nodeserve.worker.contract import Ran

_HEAD = struct.Struct("=qqddq?")
_SLOT = struct.Struct("=?xxxxxxxqdqq")  # a rank sleeps until it is called; its RankWork
Duration = Callable[[int, Sequence[RankWork]], float]


class Head(NamedTuple):
    """What the ranks share."""

    number: int  # of the newest pass
    num_missing: int  # ranks that have not entered it
    began_s: float  # of the last pass that all entered
    seconds: float  # likewise
    departure: int  # the newest that anybody had received who entered
    closed: bool  # no pass begins any more


class Board:
    """The shared memory behind `fd`. Each Board has a lock of its own on it, also in one process:
    it opens the memory again."""

    def __init__(self, fd: int, num_ranks: int) -> None:
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        num_bytes = _HEAD.size + num_ranks * _SLOT.size
        os.ftruncate(self._fd, num_bytes)  # each rank to the same size: the first one makes it
        self._memory = mmap.mmap(self._fd, num_bytes)
        self._threads = threading.Lock()  # the file lock is for all threads of a process together

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        with self._threads:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def head(self) -> Head:
        return Head._make(_HEAD.unpack_from(self._memory))

    def put_head(self, head: Head) -> None:
        _HEAD.pack_into(self._memory, 0, *head)

    def slots(self) -> list[tuple[bool, RankWork]]:
        """Of each rank: whether it sleeps, and the work that it brought to its last pass."""
        slots = _SLOT.iter_unpack(memoryview(self._memory)[_HEAD.size :])
        return [(sleeps, RankWork(*work)) for sleeps, *work in slots]

    def put_slot(self, rank: int, sleeps: bool, work: RankWork) -> None:
        _SLOT.pack_into(self._memory, _HEAD.size + rank * _SLOT.size, sleeps, *work)


class Lockstep:
    """One rank's part. `duration` gives a pass's seconds, through all stages, from its number and
    all ranks' work; the last one to enter asks it. `bell_fds` are the ranks' eventfds in their
    order; whoever hears ours calls `look`.

    With stages a pass may begin once the one before it has left the first: every rank reckons that
    from the same times by itself."""

    def __init__(
        self,
        board: Board,
        rank: int,
        bell_fds: Sequence[int],
        duration: Duration,
        clock: Callable[[], float] = time.perf_counter,
        num_stages: int = 1,
    ) -> None:
        self._board = board
        self._rank = rank
        self._bell_fds = list(bell_fds)
        self._duration = duration
        self._clock = clock
        self._departure = 0  # the newest that we have received
        self._entered = 0  # number of the pass that we entered last
        self._pipeline = Pipeline(num_stages)
        self._seen = 0  # number of the newest pass that we know to have begun
        self._ends_s = 0.0  # of that
        self._rans: dict[int, Ran] = {}  # of that and those before it that may not be over

    def opens_s(self) -> float:
        """When we may enter the next pass; inf while the one that we entered has not begun."""
        return self._pipeline.opens_s if self._seen >= self._entered else math.inf

    def is_alone(self) -> bool:
        """Whether the pass that we entered last still lacks ranks. The next one cannot begin before
        they have come: the board has room for one that gathers."""
        if self._seen >= self._entered:
            return False
        with self._board.locked():
            head = self._board.head()
        return bool(head.num_missing) and head.number == self._entered

    def called(self, departure: int) -> bool:
        """Whether the others wait for us; if not, our bell rings when they do.

        Not yet if one of them has received a later departure than we: our share of it is on its
        way, and belongs into the same pass.
        """
        self._departure = departure
        with self._board.locked():
            head = self._board.head()
            gathers = bool(head.num_missing) and head.number > self._entered
            self._board.put_slot(self._rank, not gathers, IDLE)
            return gathers and departure >= head.departure

    def enter(self, work: RankWork) -> int:
        """Take part in the pass that gathers, or call for one; its number. Not before `opens_s`.
        ShuttingDown if there is none, and a rank has left."""
        board, to_ring = self._board, list[int]()
        with board.locked():
            number, num_missing, began_s, seconds, departure, closed = board.head()
            if is_first := not num_missing:
                if closed:
                    raise ShuttingDown("a rank of this instance has left: no pass begins any more")
                number, num_missing = number + 1, len(self._bell_fds)
            assert number == self._entered + 1, (number, self._entered)
            num_missing -= 1
            board.put_slot(self._rank, False, work)
            slots = board.slots()
            if not num_missing:
                began_s = self._clock()
                seconds = self._duration(number, [work for _, work in slots])
                to_ring = self._bell_fds  # ours too: somebody has to wait for the end
            elif is_first:
                to_ring = [
                    fd for fd, (sleeps, _) in zip(self._bell_fds, slots, strict=True) if sleeps
                ]
            newest = max(departure, self._departure)
            board.put_head(Head(number, num_missing, began_s, seconds, newest, closed))
            self._entered = number
        for bell_fd in to_ring:
            os.eventfd_write(bell_fd, 1)
        return number

    def leave(self) -> bool:
        """No rank begins a pass any more. Whether one gathers that we have not entered: it cannot
        run without us."""
        with self._board.locked():
            head = self._board.head()
            self._board.put_head(head._replace(closed=True))
            return bool(head.num_missing) and head.number > self._entered

    def look(self) -> float | None:
        """What is new on the board; when the step loop is to hear of it, None: there is nothing."""
        with self._board.locked():
            head = self._board.head()
            begun = head.number - bool(head.num_missing)  # others may be in the pass after it
            if begun > self._seen:
                self._begun(begun, head.began_s, head.seconds)
                return self._ends_s
            return self._clock() if head.number > self._entered else None

    def over(self, number: int) -> Ran | None:
        """When the pass ran, once it is over. With stages it begins when the one before it ended,
        as far as others are told."""
        ran = self._rans.get(number)
        if ran is None or self._clock() < ran.began_s + ran.seconds:
            return None
        return ran

    def _begun(self, number: int, began_s: float, seconds: float) -> None:
        ends_s = self._pipeline.run(began_s, seconds)
        began_s = max(began_s, self._ends_s)
        self._rans[number] = Ran(number, began_s, ends_s - began_s)
        self._rans.pop(number - self._pipeline.num_stages - 1, None)
        self._seen, self._ends_s = number, ends_s
