"""How the passes that had prompts were filled, summed up since the start."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from nodeserve.policy.cost import RankWork


@dataclass(slots=True)
class Filled:
    """Of all instances together. Over `num`, `balance` is the mean of each pass's mean over its
    maximum of the ranks' prompt tokens: 1 where all have as many, and for instances of one rank."""

    num: int = 0
    seconds: float = 0.0
    tokens: int = 0  # of prompts
    room: int = 0  # for how many there was budget
    balance: float = 0.0

    def count(self, ranks: Sequence[RankWork], budget: int, seconds: float) -> None:
        """One more pass; a rank may compute `budget` prompt tokens in one."""
        most = num_tokens = 0
        for work in ranks:
            num_tokens += work.prefill_tokens
            most = max(most, work.prefill_tokens)
        self.num += 1
        self.seconds += seconds
        self.tokens += num_tokens
        self.room += budget * len(ranks)
        self.balance += num_tokens / len(ranks) / most

    def stats(self) -> dict[str, float]:
        """As docs/protocol.md says."""
        return asdict(self)
