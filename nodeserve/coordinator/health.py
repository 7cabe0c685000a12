"""Whether the node lives and serves: the truth, also after it has idled for hours.

Live: the loop turns; that it answers says so, and how late it was lately is told. Ready: requests
are taken, and each phase has an instance all of whose workers turn their loops. An idle worker
counts its turns as well, once a second at least, so silence is news whether or not there is work.
Degraded: it serves with less than it has.

Silence is measured in the loop's own pulses: whoever stops the whole node for an hour has not made
its workers silent. An answer costs O(workers), whatever number of requests there is.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nodeserve.coordinator.link import WorkerLink

PULSE_S = 1.0
NUM_LAGS = 10  # pulses whose lateness is remembered
LATE_S = 1.0  # of the loop, or of what it should have answered
SILENT_S = 5.0  # of a worker; or SILENT_STEPS times its last step, if that is more
SILENT_STEPS = 4.0


class Pulse:
    """Feels once a second whether the loop and the workers turn."""

    def __init__(
        self, links: Sequence[WorkerLink], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._links = links
        self._clock = clock
        self._due_s = clock() + PULSE_S
        self._lags_s: deque[float] = deque(maxlen=NUM_LAGS)
        self._seen: dict[WorkerLink, tuple[int, float]] = {}  # beats, and silence since, in pulses

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
        seen, self._seen = self._seen, {}
        for link in self._links:
            if link.alive:
                beats = link.channel.outbox.beats
                before, silent_s = seen.get(link, (beats - 1, 0.0))
                self._seen[link] = beats, silent_s + PULSE_S if beats == before else 0.0

    @property
    def lag_s(self) -> float:
        """How late the loop was at worst, in the last seconds."""
        return max([*self._lags_s, self._clock() - self._due_s, 0.0])

    def silent_s(self, link: WorkerLink) -> float:
        """For how long a worker has not turned its loop while ours turned."""
        return self._seen.get(link, (0, 0.0))[1]


@dataclass(frozen=True, slots=True)
class Seat:
    """One worker, as far as health goes."""

    name: str
    instance: int
    prefills: bool
    decodes: bool
    trouble: str  # why it makes no steps; empty: it does, or could


def seats_of(links: Iterable[WorkerLink], pulse: Pulse) -> list[Seat]:
    return [
        Seat(
            f"{link.role.value} worker {link.index}",
            link.instance,
            link.prefills,
            link.decodes,
            trouble_of(link, pulse.silent_s(link)),
        )
        for link in links
    ]


def trouble_of(link: WorkerLink, silent_s: float) -> str:
    if not link.alive:
        return f"is {link.state}"
    if silent_s >= max(SILENT_S, SILENT_STEPS * link.counters.step_s):
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
