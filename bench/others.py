"""What the rest of the machine did during a measurement: processor time that was not ours."""

import os
from pathlib import Path
from typing import NamedTuple

_TICKS = os.sysconf("SC_CLK_TCK")
_BUSY = (0, 1, 2, 5, 6, 7)  # columns of /proc/stat: user, nice, system, irq, softirq, stolen


class Spent(NamedTuple):
    """Seconds of processor time since the machine's start, of all cores."""

    total_s: float  # busy and idle
    busy_s: float
    ours_s: float  # of this process, its descendants, and their children that have ended


def spent() -> Spent:
    """Now."""
    first = Path("/proc/stat").read_text().splitlines()[0]
    columns = [int(word) for word in first.split()[1:9]]  # guests count as users already
    ticks = sum(columns), sum(columns[one] for one in _BUSY), _ours()
    return Spent(*(number / _TICKS for number in ticks))


def foreign_share(before: Spent, after: Spent) -> float:
    """Of the machine's cores, what others had in between; 0 to 1."""
    total_s, busy_s, ours_s = (late - early for early, late in zip(before, after, strict=True))
    return min(1.0, max(0.0, busy_s - ours_s) / total_s) if total_s > 0.0 else 0.0


def _ours() -> int:
    """Ticks of the tree that this process is the root of."""
    parents, ticks = {}, {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                text = Path("/proc", name, "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            words = text.rpartition(")")[2].split()
            parents[int(name)] = int(words[1])
            ticks[int(name)] = sum(map(int, words[11:15]))
    return sum(number for pid, number in ticks.items() if _descends(pid, parents))


def _descends(pid: int, parents: dict[int, int]) -> bool:
    root = os.getpid()
    while pid != root and pid in parents:
        pid = parents[pid]
    return pid == root
