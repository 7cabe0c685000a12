"""The DP ranks of an instance that compute for each other: no pass of theirs runs without all.

Each rank has requests of its own, and in every pass parts of everybody's tokens go to the experts
of everybody. So a rank that begins a pass calls the others (lockstep.py), and those without work
join it empty. What the collectives say then meets; when a pass is over each rank knows by itself.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from nodeserve.config import WorkerSpec
from nodeserve.policy.cost import RankWork
from nodeserve.worker.alarm import Alarm
from nodeserve.worker.contract import Ran
from nodeserve.worker.lockstep import Board, Lockstep


class Began(NamedTuple):
    """A pass that we are in."""

    number: int
    at_s: float


class Ranks(Protocol):
    """The other ranks, as an executor sees them."""

    def opens_s(self) -> float:
        """When we may begin the next pass: inf while others have to enter the last one. On a stage
        without experts nothing else would hold us back."""

    def called(self, departure: int) -> bool:
        """See contract.Executor."""

    def on_called(self, wake: Callable[[], None]) -> None:
        """Call `wake`, from any thread, when others wait for us, or we no longer for them."""

    def enter(self, work: RankWork) -> Began | None:
        """We begin a pass. ShuttingDown if another rank has left, and no pass begins any more."""

    def ran(self, began: Began | None) -> Ran | None:
        """It is over, and so are all before it. None: nobody but us counts passes."""

    def leave(self) -> bool:
        """See contract.Executor."""


class NoRanks:
    """There are none."""

    def opens_s(self) -> float:
        return -math.inf

    def called(self, departure: int) -> bool:
        return False

    def on_called(self, wake: Callable[[], None]) -> None:
        """Nobody does."""

    def enter(self, work: RankWork) -> Began | None:
        return None

    def ran(self, began: Began | None) -> Ran | None:
        return None

    def leave(self) -> bool:
        return False


NO_RANKS: Ranks = NoRanks()


class InStep:
    """Others there are, of which each is a process."""

    def __init__(
        self,
        lockstep: Lockstep,
        alarm: Alarm,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._lockstep = lockstep
        self._alarm = alarm
        self._clock = clock
        self._ended_s = 0.0  # when the last pass was over

    def opens_s(self) -> float:
        return math.inf if self._lockstep.is_alone() else -math.inf

    def called(self, departure: int) -> bool:
        return self._lockstep.called(departure)

    def on_called(self, wake: Callable[[], None]) -> None:
        self._alarm.start(self._lockstep.look, wake)

    def enter(self, work: RankWork) -> Began | None:
        return Began(self._lockstep.enter(work), self._clock())

    def ran(self, began: Began | None) -> Ran | None:
        """From where it began, or the pass before it was over: with several stages some are under
        way at once."""
        assert began is not None
        began_s, self._ended_s = max(began.at_s, self._ended_s), self._clock()
        return Ran(began.number, began_s, self._ended_s - began_s)

    def leave(self) -> bool:
        return self._lockstep.leave()


def ranks_of(spec: WorkerSpec) -> Ranks:
    """A follower has none: what it takes part in its leader begins, whose bell nobody else may
    hear."""
    if spec.ep == 1 or not spec.leads:
        return NO_RANKS
    bells = spec.bell_fds[:: spec.team_size]  # the leaders'
    rank = spec.rank // spec.team_size
    board = Board(spec.board_fd, spec.ep)
    return InStep(Lockstep(board, rank, bells, lambda number, works: 0.0), Alarm(bells[rank]))
