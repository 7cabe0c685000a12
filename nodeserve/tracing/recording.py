"""Recording what a running server says of itself, for a time or a number of requests."""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nodeserve.client.connection import Connection, TraceEvent, connect
from nodeserve.client.mailbox import Mailbox
from nodeserve.errors import NodeServeError, ProtocolError
from nodeserve.wire.messages import Traced
from nodeserve.wire.tracing import EVENTS, Arrived, Ended, Event

SHOWN = ("model", "layout", "version")  # of what the server says about itself
LAST_WORDS_S = 10.0  # for a server to send what it has, once it was told that it is enough


class Recording:
    """Events so far; `num_requests` None: any number of requests is wanted."""

    def __init__(
        self, num_requests: int | None = None, server: dict[str, Any] | None = None
    ) -> None:
        self.server = {name: (server or {}).get(name) for name in SHOWN}
        self.events: list[Event] = []
        self.lost = 0  # events that we read too late for
        self.over = False
        self.error: NodeServeError | None = None  # that ended the connection before
        self._wanted = num_requests
        self._open: set[int] = set()  # wanted requests that have not ended
        self._num_arrived = 0

    @property
    def complete(self) -> bool:
        """All that were wanted have arrived and ended."""
        return self._wanted is not None and self._num_arrived >= self._wanted and not self._open

    def add(self, came: list[TraceEvent]) -> None:
        for message in came:
            if isinstance(message, Traced):
                self._add(message)
            else:
                self.error, self.over = message, True

    def _add(self, message: Traced) -> None:
        self.lost, self.over = message.lost, message.over
        for parts in message.events:
            try:
                event = EVENTS.made_of(parts)
            except ProtocolError:
                continue  # of a later release within this version
            self.events.append(event)
            if isinstance(event, Arrived) and self._num_arrived != self._wanted:
                self._num_arrived += 1
                self._open.add(event.request)
            elif isinstance(event, Ended):
                self._open.discard(event.request)


async def record(
    path: Path,
    seconds: float | None,
    num_requests: int | None,
    on_began: Callable[[], object] = lambda: None,
) -> Recording:
    """Until so much time is over, so many requests that arrived from now on have ended, SIGINT or
    SIGTERM; None: no limit. What was recorded when the server ends is there, with the error.

    ConnectionLost when there is no server. `on_began`: the server tells from now on.
    """
    connection = await connect(path, LAST_WORDS_S)
    recording = Recording(num_requests, connection.server)
    try:
        mailbox = connection.trace(True)
        recording.add(await mailbox.take())
        on_began()
        with interruptible(asyncio.ensure_future(collect(recording, mailbox))) as collecting:
            await asyncio.wait({collecting}, timeout=seconds)
        await finish(recording, connection, mailbox)
    finally:
        await connection.close()
    return recording


async def collect(recording: Recording, mailbox: Mailbox[TraceEvent]) -> None:
    while not (recording.over or recording.complete):
        recording.add(await mailbox.take())


async def finish(
    recording: Recording, connection: Connection, mailbox: Mailbox[TraceEvent]
) -> None:
    """Take what the server still has."""
    connection.trace(False)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_WORDS_S):
            while not recording.over:
                recording.add(await mailbox.take())


@contextlib.contextmanager
def interruptible(task: "asyncio.Task[None]") -> Iterator["asyncio.Task[None]"]:
    """Within the block SIGINT and SIGTERM end the task; after it, it has ended."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        yield task
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        task.cancel()
