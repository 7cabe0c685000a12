"""In which order clients' messages are taken, and how many before the loop goes on to other things.

Always true: a connection's messages are taken in the order in which they came, and in one turn of
the loop MOST_A_TURN of all connections together. The others wait their turn, one connection after
the other, and while a connection has any that wait it is not read. So a client that floods the
socket slows itself down: not the workers, whose records wait for a turn at most, nor the others.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

MOST_A_TURN = 32  # messages; a refusal takes some 50 us
SHARE = 8  # of one connection before the next one's turn


class Source(Protocol):
    """A connection."""

    def take(self, most: int) -> int:
        """Handle up to so many of its messages; returns how many that were."""

    def drained(self) -> bool:
        """Whether none waits any more; reads on if so."""


class Intake:
    """`call_soon` runs a function in the loop's next turn."""

    def __init__(self, call_soon: Callable[[Callable[[], None]], Any]) -> None:
        self._call_soon = call_soon
        self._line: deque[Source] = deque()  # those with messages that wait
        self._left = MOST_A_TURN
        self._counting = False  # a turn is begun, its end is scheduled

    def offer(self, source: Source) -> None:
        """`source` has messages, and did not have any that wait."""
        if not self._counting:
            self._counting = True
            self._call_soon(self._next_turn)
        if self._line:
            if not source.drained():
                self._line.append(source)
        else:
            self._take(source, self._left)

    def _next_turn(self) -> None:
        self._left = MOST_A_TURN
        try:
            while self._line and self._left > 0:
                self._take(self._line.popleft(), min(SHARE, self._left))
        finally:  # whatever one client's message did, the others' turn comes
            self._counting = bool(self._line) or self._left < MOST_A_TURN
            if self._counting:
                self._call_soon(self._next_turn)

    def _take(self, source: Source, most: int) -> None:
        try:
            self._left -= source.take(most)
        finally:
            if not source.drained():
                self._line.append(source)
