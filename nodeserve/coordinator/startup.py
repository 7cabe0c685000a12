"""Waits for somebody who is late with starting."""

import asyncio
from collections.abc import Callable, Sequence

from nodeserve.coordinator.link import WorkerLink

TICK_S = 1.0  # at least so often it is asked whether the loop itself stood still


async def late_ones(links: Sequence[WorkerLink], clock: Callable[[], float]) -> list[WorkerLink]:
    """Returns when workers are late: which. Never, if all come in time.

    Time in which our own loop stood still (the node was suspended, say) is not held against them:
    what they said meanwhile has not been read yet.
    """
    while True:
        slept_s = clock()
        starts = [link.start for link in links if link.start is not None]
        first_s = min((start.deadline_s for start in starts), default=slept_s + TICK_S)
        wait_s = min(TICK_S, max(0.0, first_s - slept_s))
        await asyncio.sleep(wait_s)
        now_s = clock()
        for start in starts:
            start.pause(now_s - slept_s - wait_s)
        if late := [link for link in links if is_late(link, now_s)]:
            return late


def is_late(link: WorkerLink, now_s: float) -> bool:
    return link.start is not None and link.start.deadline_s <= now_s
