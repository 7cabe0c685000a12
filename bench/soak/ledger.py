"""What happened: counts, what was wrong, and figures second by second."""

from collections import Counter
from dataclasses import dataclass, field

MOST_TOLD = 50  # faults in words; all are counted
LOST_AFTER = 3  # workers that end under one request before it ends too


@dataclass(slots=True)
class Second:
    """One second of a run."""

    ended: int = 0  # well
    in_time: int = 0  # of those, within the limits
    tokens: int = 0
    refused: int = 0
    rss_bytes: dict[int, int] = field(default_factory=dict)  # by process id
    kills: int = 0


@dataclass(slots=True)
class Ledger:
    """`counts` are of requests by what they did and by how they ended."""

    counts: Counter[str] = field(default_factory=Counter)
    num_faults: int = 0
    faults: list[str] = field(default_factory=list)
    seconds: list[Second] = field(default_factory=lambda: [Second()])
    num_open: int = 0
    num_kills: int = 0

    def killed(self) -> None:
        self.num_kills += 1
        self.now.kills += 1

    def may_be_lost(self, since_kills: int) -> bool:
        """Whether a request that came after so many kills may have ended for their sake."""
        return self.num_kills - since_kills >= LOST_AFTER

    @property
    def now(self) -> Second:
        return self.seconds[-1]

    def fault(self, words: str) -> None:
        """Something that must never be."""
        self.num_faults += 1
        if len(self.faults) < MOST_TOLD:
            self.faults.append(words)
