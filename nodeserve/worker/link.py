"""Our ends of the rings, in messages instead of records."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

from nodeserve.wire.channel import ChannelSpec, TeamEnd, TeamSpec, WorkerEnd
from nodeserve.wire.messages import FROM_WORKER, TO_WORKER, FromWorker, ToWorker
from nodeserve.wire.team import FROM_FOLLOWER, TO_FOLLOWER, FromFollower, ToFollower

PUT_S = 1.0  # between two signs of life while a ring is full


class RingLink:
    """What `runner.Link` describes, over shared memory."""

    def __init__(self, channel: dict[str, Any]) -> None:
        self._end = WorkerEnd(ChannelSpec(**channel))
        self._inbox, self._outbox = self._end.inbox, self._end.outbox
        self.num_sent = 0

    def drain(self) -> list[ToWorker]:
        records = self._inbox.drain()
        return [TO_WORKER.decode(record) for record in records] if records else []

    def wait(self, timeout_s: float) -> None:
        self._inbox.wait(timeout_s)

    def wake(self) -> None:
        self._inbox.wake()

    def put(self, message: FromWorker) -> None:
        record = FROM_WORKER.encode(message)
        while not self._outbox.put(record, timeout_s=PUT_S):
            self.beat()  # blocked by a slow coordinator is not the same as stuck
        self.num_sent += 1

    def beat(self) -> None:
        self._outbox.beat()

    def team_end(self, spec: dict[str, Any], leads: bool) -> TeamEnd:
        """Our end of the rings to another worker of our team; records there end our waits."""
        return TeamEnd(TeamSpec(**spec), leads, self._end)

    def __enter__(self) -> "RingLink":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.close()


class LeaderLink:
    """What `follower.Leader` describes, over shared memory; `beat` while its ring is full."""

    def __init__(self, end: TeamEnd, beat: Callable[[], None]) -> None:
        self._end = end
        self._beat = beat

    def drain(self) -> list[ToFollower]:
        return [TO_FOLLOWER.decode(record) for record in self._end.inbox.drain()]

    def put(self, message: FromFollower) -> None:
        record = FROM_FOLLOWER.encode(message)
        while not self._end.outbox.put(record, timeout_s=PUT_S):
            self._beat()
