"""A leader's side of its team: one ring of plans to each follower, one of answers back.

The leader decides and publishes; collectives between the workers carry activations only. So that
they can neither deadlock nor drift, everything that a team computes stands in one order, that of
the leader's records: steps are numbered, each member takes part in them in that order, and a
follower that meets another number ends (`TeamError`), and with it the instance.

A follower that is dead or stuck holds the leader up at most: in a collective, or in a ring that is
full. The coordinator sees either and ends the instance.
"""

from collections import deque
from collections.abc import Callable, Sequence

from nodeserve.errors import TeamError
from nodeserve.wire.channel import TEAM_RING_BYTES, TeamEnd
from nodeserve.wire.team import (
    FROM_FOLLOWER,
    TO_FOLLOWER,
    AboutPages,
    Choose,
    Joined,
    Leave,
    Part,
    Passed,
    Step,
    ToFollower,
    Warm,
)

PART_BYTES = TEAM_RING_BYTES // 4  # of a plan in one record: several have room in a ring
WAIT_S = 1.0  # between two signs of life while somebody is not ready, or its ring full


class LeaderTeam:
    """What `contract.Team` describes, over shared memory. `wait` sleeps until a follower may have
    said something, `beat` is a sign of life; both are the worker's own link's."""

    def __init__(
        self,
        ends: Sequence[TeamEnd],
        wait: Callable[[float], object],
        beat: Callable[[], None],
    ) -> None:
        self._ends = list(ends)
        self._wait = wait
        self._beat = beat
        self._num_steps = self._num_passed = self._num_chosen = 0
        self._answers: deque[AboutPages] = deque()  # about pages

    @property
    def num_followers(self) -> int:
        return len(self._ends)

    def step(self, plan: Callable[[], bytes]) -> int:
        self._num_steps += 1
        if not self._ends:
            return self._num_steps
        data = plan()
        while len(data) > PART_BYTES:
            self.post(Part(data[:PART_BYTES]))
            data = data[PART_BYTES:]
        self.post(Step(self._num_steps, data))
        return self._num_steps

    def has_passed(self, number: int) -> bool:
        self._listen()
        return self._num_passed >= number

    def wait(self) -> None:
        self._beat()
        self._wait(WAIT_S)

    def choose(self) -> None:
        self._num_chosen += 1
        self.post(Choose(self._num_chosen))

    def warm(self) -> None:
        self.post(Warm())

    def least_blocks(self, num_blocks: int) -> int:
        joined: dict[int, int] = {}
        while len(joined) < len(self._ends):
            for place, end in enumerate(self._ends):
                for record in end.inbox.drain(1):
                    message = FROM_FOLLOWER.decode(record)
                    kind = type(message).__name__
                    if not isinstance(message, Joined):
                        raise TeamError(f"a follower said {kind} before it joined")
                    joined[place] = message.num_blocks
            if len(joined) < len(self._ends):
                self.wait()
        return min([num_blocks, *joined.values()])

    def post(self, message: ToFollower) -> None:
        """To every follower, in the order of these calls."""
        if not self._ends:
            return
        record = TO_FOLLOWER.encode(message)
        for end in self._ends:
            while not end.outbox.put(record, timeout_s=WAIT_S):
                self._beat()
                self._listen()  # it may be waiting for room in the ring to us before it reads on

    def answers(self) -> list[AboutPages]:
        """What they said about pages since the last time."""
        self._listen()
        said = list(self._answers)
        self._answers.clear()
        return said

    def _listen(self) -> None:
        for end in self._ends:
            for record in end.inbox.drain():
                message = FROM_FOLLOWER.decode(record)
                if isinstance(message, Passed):
                    self._passed(message.number)
                elif isinstance(message, Joined):
                    raise TeamError("a follower joined twice")
                else:
                    self._answers.append(message)

    def _passed(self, number: int) -> None:
        if number != self._num_passed + 1:
            raise TeamError(f"step {number} passed the last stage, {self._num_passed + 1} was due")
        self._num_passed = number

    def leave(self) -> None:
        """The leader's last word: nothing is launched any more."""
        self.post(Leave())
