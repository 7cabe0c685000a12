"""How much an arm can take: its throughput when overloaded, and its highest rate under a limit."""

from collections.abc import Callable
from typing import NamedTuple

STEPS = 100  # a load of 1 is so many steps: rates are searched to 1 %
HIGHEST_LOAD = 1.3


class Limits(NamedTuple):
    """The highest loads that meet each limit; 0: none does."""

    mean: float
    p99: float


def highest_load(meets: Callable[[int], bool]) -> float:
    """The highest load, in steps, that `meets` accepts below the first that it does not.

    Bisection: it takes for granted that a higher load is never better. At most eight calls.
    """
    low, high = 0, int(HIGHEST_LOAD * STEPS) + 1  # accepted, refused
    while high - low > 1:
        middle = (low + high) // 2
        if meets(middle):
            low = middle
        else:
            high = middle
    return low / STEPS


def limits(
    measure: Callable[[float], tuple[float, float]], mean_limit_s: float, p99_limit_s: float
) -> Limits:
    """`measure` gives mean and P99 TTFT at a load; what is measured once is remembered."""
    seen: dict[int, tuple[float, float]] = {}

    def at(step: int) -> tuple[float, float]:
        if step not in seen:
            seen[step] = measure(step / STEPS)
        return seen[step]

    return Limits(
        highest_load(lambda step: at(step)[0] <= mean_limit_s),
        highest_load(lambda step: at(step)[1] <= p99_limit_s),
    )
