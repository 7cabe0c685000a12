"""When an instance whose worker died is started again, and when it is given up.

A death that comes alone is followed by a short wait. Each further one within `window_s` doubles it,
so that a fault that stays costs the node little; one that is past `max_restarts` takes the instance
out for good: what dies that often would only take requests with it.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartOptions:
    """How patient the node is with an instance."""

    max_restarts: int = 5  # in `window_s`; 0: the first death is the last
    first_delay_s: float = 0.5
    longest_delay_s: float = 30.0
    window_s: float = 600.0


class Restarts:
    """One instance's deaths. Times are of a monotonic clock."""

    def __init__(self, options: RestartOptions) -> None:
        self._options = options
        self._deaths_s: list[float] = []

    def died(self, now_s: float) -> float | None:
        """Seconds to wait before the next start; None: there is none."""
        options = self._options
        self._deaths_s = [at_s for at_s in self._deaths_s if now_s - at_s < options.window_s]
        self._deaths_s.append(now_s)
        earlier = len(self._deaths_s) - 1
        if earlier >= options.max_restarts:
            return None
        doubled = options.first_delay_s * 2.0 ** min(earlier, 64)
        return min(doubled, options.longest_delay_s)
