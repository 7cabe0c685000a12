"""How much one connection may ask for, so that a client that runs wild hurts itself alone."""

import math
from dataclasses import dataclass

from nodeserve.errors import Overloaded

RETRY_S = 1.0  # for one with too many open requests: when some have ended nobody knows
BURST_S = 1.0  # of its rate may come at once


@dataclass(frozen=True, slots=True)
class Quota:
    """`max_rate` is in requests a second; None: any."""

    max_open: int = 4096
    max_rate: float | None = None


class Meter:
    """Counts one connection's requests: a token bucket that holds BURST_S of its rate, one at
    least. Refusals cost nothing, so who comes back in time is let in."""

    def __init__(self, quota: Quota) -> None:
        self._quota = quota
        self._most = max(1.0, BURST_S * (quota.max_rate or 0.0))
        self._left = self._most
        self._counted_s = -math.inf

    def take(self, num_open: int, now_s: float) -> None:
        """One more request beside `num_open`; Overloaded says when it may be worth another try."""
        quota = self._quota
        if num_open >= quota.max_open:
            raise Overloaded(
                f"{num_open} requests of this connection are open, which is as many as one may"
                " have: wait until some have ended, or raise --max-connection-reqs",
                RETRY_S,
            )
        if quota.max_rate is None:
            return
        self._left = min(self._most, self._left + (now_s - self._counted_s) * quota.max_rate)
        self._counted_s = now_s
        if self._left < 1.0:
            raise Overloaded(
                f"this connection sends more than its {quota.max_rate:g} requests a second: send"
                " fewer, or raise --max-connection-rate",
                (1.0 - self._left) / quota.max_rate,
            )
        self._left -= 1.0
