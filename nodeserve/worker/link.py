"""Our end of the rings, in messages instead of records."""

from types import TracebackType
from typing import Any

from nodeserve.wire.channel import ChannelSpec, WorkerEnd
from nodeserve.wire.messages import FROM_WORKER, TO_WORKER, FromWorker, ToWorker


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
        while not self._outbox.put(record, timeout_s=1.0):
            self.beat()  # blocked by a slow coordinator is not the same as stuck
        self.num_sent += 1

    def beat(self) -> None:
        self._outbox.beat()

    def __enter__(self) -> "RingLink":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.close()
