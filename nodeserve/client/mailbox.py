"""Where what comes for one request waits for the task that takes it, or passes through at once."""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Mailbox(Generic[Item]):
    """What came for one request and was not taken yet. One task at a time may take or pour.

    A future of its own costs half of what asyncio.Event does, and every token passes here.
    """

    def __init__(self) -> None:
        self._events: list[Item] = []
        self._waiter: asyncio.Future[None] | None = None
        self._sink: Callable[[list[Item]], bool] | None = None  # of who waits, if it pours

    def put(self, event: Item) -> None:
        self.add(event)
        self.wake()

    def add(self, event: Item) -> None:
        """Whoever waits is to be woken."""
        self._events.append(event)

    def wake(self) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():  # done: its task was cancelled, or is woken already
            return
        if self._sink is not None:
            try:
                if self._offer(self._sink):
                    return
            except Exception as error:  # noqa: BLE001  # it is the waiting task's, not the reader's
                waiter.set_exception(error)
                return
        waiter.set_result(None)

    async def take(self) -> list[Item]:
        """Everything that is there, at least one."""
        while not self._events:  # it may be woken for what it took already
            await self._woken()
        events, self._events = self._events, []
        return events

    async def pour(self, sink: Callable[[list[Item]], bool]) -> None:
        """Give `sink` all that is there, and then whatever comes in the same turn of the loop, with
        no task between: for a busy reader that is half of the work. Until `sink` returns False,
        which leaves what it was shown here; what it raises is raised here."""
        if not self._offer(sink):
            return
        try:
            await self._woken(sink)
        finally:
            if self._sink is sink:  # one that was cancelled may end after another began
                self._sink = None

    def _offer(self, sink: Callable[[list[Item]], bool]) -> bool:
        if self._events:
            if not sink(self._events):
                return False
            self._events = []
        return True

    async def _woken(self, sink: Callable[[list[Item]], bool] | None = None) -> None:
        self._sink = sink
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter
