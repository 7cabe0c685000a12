"""The loop of a worker that follows: it does what its leader's records say, in their order.

It has no queue and books nothing: it takes its part in the leader's steps, and copies its own part
of the blocks that the leader names. The coordinator starts it, watches it and tells it of peers'
pages, as any worker; it leaves with its leader.

Always true: a record is carried out before the next one is looked at. So pages that a cancelled
pull was for are free for the steps behind it, and what a step wrote is there for the copies.
"""

from collections.abc import Callable
from typing import Any, Protocol

from nodeserve.errors import CudaError, NodeServeError, TeamError
from nodeserve.wire.messages import (
    AttachPages,
    CountExperts,
    DetachPages,
    ExpertsCounted,
    FromWorker,
    PagesAttached,
    ToWorker,
)
from nodeserve.wire.team import (
    Choose,
    CopyFailed,
    Forget,
    FromFollower,
    Joined,
    Landed,
    Leave,
    Offer,
    Offered,
    Part,
    Passed,
    Pull,
    Step,
    ToFollower,
    Warm,
)
from nodeserve.worker import contract
from nodeserve.worker.contract import (
    ExpertRows,
    Following,
    Moved,
    Ticket,
    Transfer,
    count_nothing,
    forget_nothing,
)
from nodeserve.worker.peer_seats import PeerSeats


class Link(Protocol):
    """Our end of the rings to the coordinator."""

    def drain(self) -> list[ToWorker]: ...

    def wait(self, timeout_s: float) -> None:
        """Also ends when the leader has said something."""

    def wake(self) -> None: ...

    def put(self, message: FromWorker) -> None: ...

    def beat(self) -> None: ...


class Leader(Protocol):
    """Our end of the rings to the leader."""

    def drain(self) -> list[ToFollower]: ...

    def put(self, message: FromFollower) -> None: ...


class Follower:
    """Carries out what the leader says. `idle_wait_s` bounds the age of the last sign of life."""

    def __init__(
        self,
        link: Link,
        leader: Leader,
        following: Following,
        transfer: Transfer,
        seats: PeerSeats,
        idle_wait_s: float = 1.0,
        expert_rows: Callable[[], ExpertRows] = count_nothing,
        forget_rows: Callable[[], None] = forget_nothing,
    ) -> None:
        self.stopped = False
        self._link = link
        self._leader = leader
        self._following = following
        self._transfer = transfer
        self._seats = seats
        self._idle_wait_s = idle_wait_s
        self._expert_rows = expert_rows
        self._forget_rows = forget_rows
        self._num_steps = self._num_chosen = self._num_passed = 0
        self._parts: list[bytes] = []
        self._copies: dict[int, int] = {}  # by request: number of the Pull or Offer under way
        transfer.on_done(link.wake)
        self._take: dict[type, Callable[[Any], None]] = {
            Part: self._part,
            Step: self._step,
            Choose: self._choose,
            Warm: self._warm,
            Pull: self._pull,
            Offer: self._offer,
            Forget: self._forget,
            Leave: self._leave,
        }

    def run(self, num_blocks: int) -> None:
        """Say that steps can come; follow until the leader leaves."""
        self._leader.put(Joined(num_blocks))
        while not self.stopped:
            self.turn()

    def turn(self) -> None:
        """What has come; sleeps if nothing has."""
        self._link.beat()
        said = self._link.drain()
        for message in said:
            self._from_coordinator(message)
        self._pass()
        plans = self._leader.drain()
        for plan in plans:
            self._link.beat()
            self._take[type(plan)](plan)
            self._pass()
        moved = self._transfer.poll()
        for one in moved:
            self._tell(one)
        if not (said or plans or moved or self._transfer.busy or self.stopped):
            self._link.wait(self._idle_wait_s)

    # ---- the coordinator

    def _from_coordinator(self, message: ToWorker) -> None:
        if isinstance(message, AttachPages):
            self._seats.attach(message)
            self._link.put(PagesAttached(message.worker))
        elif isinstance(message, DetachPages):
            for request_id in self._seats.detach(message.worker):
                self._copies.pop(request_id, None)  # the leader has the same word, or will
        elif isinstance(message, CountExperts):
            self._link.put(ExpertsCounted(message.number, *self._expert_rows()))
        else:
            raise TeamError(f"{type(message).__name__} is for leaders, this worker follows one")

    # ---- steps

    def _part(self, message: Part) -> None:
        self._parts.append(message.data)

    def _step(self, message: Step) -> None:
        self._num_steps = _next(message.number, self._num_steps, "step")
        plan = b"".join([*self._parts, message.data]) if self._parts else message.data
        self._parts.clear()
        self._following.follow(plan)

    def _choose(self, message: Choose) -> None:
        self._num_chosen = _next(message.number, self._num_chosen, "choice")
        self._following.choose()

    def _warm(self, message: Warm) -> None:
        self._forget_rows()

    def _pass(self) -> None:
        """Tell the leader whose results are on their way to it."""
        for _ in range(self._following.num_passed()):
            self._num_passed += 1
            self._leader.put(Passed(self._num_passed))

    # ---- pages

    def _pull(self, message: Pull) -> None:
        number, request_id, source, source_ids, target_ids = message
        self._copies[request_id] = number
        try:
            self._transfer.begin(Ticket(request_id, source, source_ids, target_ids))
        except CudaError:
            raise  # not this request's: the device is lost
        except NodeServeError as problem:
            self._tell(contract.CopyFailed(request_id, problem))

    def _offer(self, message: Offer) -> None:
        self._copies[message.request_id] = message.number
        ids = self._transfer.offer(message.request_id, message.block_ids)
        if ids is not None:
            self._tell(contract.Offered(message.request_id, ids))

    def _forget(self, message: Forget) -> None:
        self._copies.pop(message.request_id, None)
        self._transfer.cancel(message.request_id)

    def _tell(self, moved: Moved) -> None:
        number = self._copies.pop(moved.request_id)
        if isinstance(moved, contract.Landed):
            self._leader.put(Landed(number, moved.num_bytes, moved.seconds))
        elif isinstance(moved, contract.Offered):
            self._leader.put(Offered(number, moved.block_ids))
        else:
            self._leader.put(CopyFailed(number, moved.problem.code, str(moved.problem)))

    def _leave(self, message: Leave) -> None:
        self.stopped = True


def _next(number: int, last: int, what: str) -> int:
    if number != last + 1:
        raise TeamError(f"the leader began {what} {number}, here {last + 1} was due")
    return number
