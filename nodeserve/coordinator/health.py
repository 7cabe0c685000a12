"""Whether the node lives and serves: the truth, also after it has idled for hours.

Live: the loop turns; that it answers says so, and how late it was lately is told. Ready: requests
are taken, and each phase has an instance all of whose workers turn their loops. An idle worker
counts its turns as well, once a second at least, so silence is news whether or not there is work.
Degraded: it serves with less than it has.

Silence counts only while the loop turned: whoever stops the whole node for an hour has not made its
workers silent (policy/watchdog.py). An answer costs O(workers), however many requests there are.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nodeserve.coordinator.link import WorkerLink
from nodeserve.types import Role

PULSE_S = 1.0
NUM_LAGS = 10  # pulses whose lateness is remembered
LATE_S = 1.0  # of the loop, or of what it should have answered
SILENT_S = 5.0  # of a worker; or SILENT_STEPS times its last step, if that is more
SILENT_STEPS = 4.0


class Pulse:
    """Feels once a second whether the loop turns. `on_beat` is called as often."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        on_beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._clock = clock
        self._on_beat = on_beat
        self._due_s = clock() + PULSE_S
        self._lags_s: deque[float] = deque(maxlen=NUM_LAGS)

    async def run(self) -> None:
        """Until cancelled."""
        self._due_s = self._clock() + PULSE_S
        while True:
            await asyncio.sleep(self._due_s - self._clock())
            self.beat()

    def beat(self) -> None:
        """One pulse, now."""
        now_s = self._clock()
        self._lags_s.append(max(0.0, now_s - self._due_s))
        self._due_s = now_s + PULSE_S
        self._on_beat()

    @property
    def lag_s(self) -> float:
        """How late the loop was at worst, in the last seconds."""
        return max([*self._lags_s, self._clock() - self._due_s, 0.0])


@dataclass(frozen=True, slots=True)
class Seat:
    """One worker, as far as health goes."""

    name: str
    instance: int
    prefills: bool
    decodes: bool
    trouble: str  # why it makes no steps; empty: it does, or could


def seat_of(link: WorkerLink) -> Seat:
    return Seat(
        f"{link.role.value} worker {link.index}",
        link.instance,
        link.prefills,
        link.acting is not Role.PREFILL,
        trouble_of(link),
    )


def trouble_of(link: WorkerLink) -> str:
    if not link.alive:
        return f"is {link.state}" + (f" ({link.reason})" if link.reason else "")
    silent_s = link.watchdog.silent_s  # followers tell of no steps, their watchdogs know of them
    if silent_s >= max(SILENT_S, SILENT_STEPS * link.watchdog.last_step_s):
        return f"has been silent for {silent_s:.0f} s"
    return ""


def health_of(
    seats: Sequence[Seat], lag_s: float, stopping: bool, doubts: Iterable[str] = ()
) -> dict[str, Any]:
    """What docs/protocol.md says of Health. `doubts`: more that makes it degraded."""
    broken = {seat.instance for seat in seats if seat.trouble}
    usable = [seat for seat in seats if seat.instance not in broken]
    reasons = [f"{seat.name} {seat.trouble}" for seat in seats if seat.trouble]
    missing = [
        f"nobody is there for {phase}"
        for phase, served in (
            ("prefill", any(seat.prefills for seat in usable)),
            ("decode", any(seat.decodes for seat in usable)),
        )
        if not served
    ]
    reasons = [*missing, *reasons, *doubts]
    if lag_s >= LATE_S:
        reasons.append(f"the server's loop was {lag_s:.1f} s late within the last {NUM_LAGS} s")
    if stopping:
        reasons.insert(0, "it was told to stop and takes no new requests")
    state = "degraded" if reasons else "ready"
    if missing:
        state = "not ready"
    if stopping:
        state = "stopping"
    return {
        "state": state,
        "live": True,
        "ready": state in ("ready", "degraded"),
        "reasons": reasons,
        "loop_lag_ms": 1e3 * lag_s,
    }
