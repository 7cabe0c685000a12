"""When the coordinator decides: after what came, and at a time that it named."""

import asyncio
from collections.abc import Callable

LEAST_WAIT_S = 1e-3  # the loop's timers count whole milliseconds


class Turns:
    """`run` calls `turn` once for each turn of the loop in which `wake` was called, however often,
    and at the time that its last call returned (None: no time).

    `turn` is given the earliest time that it may take for now: a timer that rounds to milliseconds
    may ring half of one early, and to find then that it is too early would be to wait again.
    `clock` is what the times are of.
    """

    def __init__(self, clock: Callable[[], float], turn: Callable[[float], float | None]) -> None:
        self._clock = clock
        self._turn = turn
        self._woken = asyncio.Event()
        self._earliest_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._rings_s: float | None = None

    def wake(self) -> None:
        """Something came: decide once all that came with it is known."""
        self._woken.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._woken.wait()
            self._woken.clear()
            earliest_s, self._earliest_s = self._earliest_s, 0.0
            self._set_timer(self._turn(earliest_s))

    def _set_timer(self, at_s: float | None) -> None:
        if at_s == self._rings_s:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._rings_s = None, at_s
        if at_s is not None:
            wait_s = max(at_s - self._clock(), LEAST_WAIT_S)
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._ring, at_s)

    def _ring(self, at_s: float) -> None:
        self._timer = self._rings_s = None
        self._earliest_s = at_s
        self._woken.set()
