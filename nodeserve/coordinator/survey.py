"""One question to several workers at once, answered together."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from nodeserve.coordinator.link import WorkerLink

ANSWER_TIMEOUT_S = 10.0  # a worker may be within a long pass

Tell = Callable[[dict[str, Any]], None]


class Survey:
    """Carries out surveys, one at a time; who asks during one gets the next.

    `begin` sends the question, by its number, and says to whom. `result` is what came of it when
    all have answered, or ANSWER_TIMEOUT_S later.
    """

    def __init__(
        self,
        begin: Callable[[int], Iterable[WorkerLink]],
        result: Callable[[], dict[str, Any]],
    ) -> None:
        self._send = begin
        self._result = result
        self._waiting: list[Tell] = []
        self._tellers: list[Tell] = []
        self._missing: set[WorkerLink] = set()
        self._number = 0
        self._deadline: asyncio.TimerHandle | None = None

    def ask(self, tell: Tell) -> None:
        """`tell` gets the result, in ANSWER_TIMEOUT_S after the start at most."""
        self._waiting.append(tell)
        if self._deadline is None:
            self._begin()

    def expects(self, link: WorkerLink, number: int) -> bool:
        """Whether this worker's answer to question `number` is neither here nor too late."""
        return number == self._number and link in self._missing

    def answered(self, link: WorkerLink) -> None:
        """What it says was taken in."""
        self._missing.discard(link)
        if not self._missing:
            self._finish()

    def _begin(self) -> None:
        self._tellers, self._waiting = self._waiting, []
        self._number += 1
        self._missing = set(self._send(self._number))
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(ANSWER_TIMEOUT_S, self._finish)
        if not self._missing:
            self._finish()

    def _finish(self) -> None:
        assert self._deadline is not None
        self._deadline.cancel()
        self._deadline = None
        self._missing.clear()
        result = self._result()
        for tell in self._tellers:
            tell(result)
        if self._waiting:
            self._begin()
