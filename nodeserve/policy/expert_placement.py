"""Which rank holds which experts, by how many rows each expert got: the hot ones twice or more.

Ranks of an expert-parallel instance wait for each other in every sparse layer, so the one with the
most rows sets the pace. Slots beyond the number of experts take second copies; the rows of an
expert are shared out evenly over its copies.
"""

import heapq
from collections.abc import Iterable, Sequence

Placement = tuple[tuple[int, ...], ...]  # the experts that each rank holds, rising


def place(loads: Sequence[float], num_ranks: int, num_spare_slots: int = 0) -> Placement:
    """loads: rows of each expert, as counted; `num_spare_slots` beyond one for each expert.

    Every expert has a slot, no rank holds one twice, and ranks hold as many as each other, or one
    more. The same numbers give the same placement.
    """
    copies = _copies(loads, num_ranks, num_spare_slots)
    each, more = divmod(sum(copies), num_ranks)
    ranks = [_Rank(each + (rank < more)) for rank in range(num_ranks)]
    shares = [(loads[one] / count, one) for one, count in enumerate(copies) for _ in range(count)]
    for share, expert in sorted(shares, key=lambda one: (-one[0], one[1])):
        _put(ranks, expert, share)
    return tuple(tuple(sorted(rank.shares)) for rank in ranks)


def rows_of(placement: Placement, loads: Sequence[float]) -> list[float]:
    """Rows of each rank, were the rows of every expert shared out evenly over its copies."""
    copies = [0] * len(loads)
    for held in placement:
        for expert in held:
            copies[expert] += 1
    return [sum(loads[expert] / copies[expert] for expert in held) for held in placement]


def imbalance(layers: Iterable[Sequence[float]]) -> float:
    """Rows of the busiest rank by those of the mean one: how much longer the experts take than
    they would in balance. 1.0 where nothing is loaded. `layers`: in each of them the rows of every
    rank; ranks wait for the busiest in each, so its rows are added up."""
    busiest = mean = 0.0
    for rows in layers:
        busiest += max(rows)
        mean += sum(rows) / len(rows)
    return busiest / mean if mean else 1.0


class _Rank:
    """What is on a rank so far."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.shares: dict[int, float] = {}  # rows of each expert here

    @property
    def rows(self) -> float:
        return sum(self.shares.values())

    @property
    def is_full(self) -> bool:
        return len(self.shares) == self.num_slots


def _copies(loads: Sequence[float], num_ranks: int, num_spare_slots: int) -> list[int]:
    """How many copies of each expert: the next one always for the copy with the most rows."""
    copies = [1] * len(loads)
    heap = [(-load, expert) for expert, load in enumerate(loads)]
    heapq.heapify(heap)
    for _ in range(num_spare_slots if num_ranks > 1 else 0):
        if not heap:  # a copy of everything is everywhere
            break
        _, expert = heapq.heappop(heap)
        copies[expert] += 1
        if copies[expert] < num_ranks:
            heapq.heappush(heap, (-loads[expert] / copies[expert], expert))
    return copies


def _put(ranks: list[_Rank], expert: int, share: float) -> None:
    """To the least busy rank with room, but for those that hold it already."""
    free = [rank for rank in ranks if not rank.is_full]
    without = [rank for rank in free if expert not in rank.shares]
    if without:
        min(without, key=lambda rank: rank.rows).shares[expert] = share
        return
    # Only ranks that hold it have room: one that does not gives them its least loaded other expert.
    giver = min((rank for rank in ranks if expert not in rank.shares), key=lambda rank: rank.rows)
    taker = min(free, key=lambda rank: rank.rows)
    moved = min(
        (one for one in giver.shares if one not in taker.shares), key=giver.shares.__getitem__
    )
    taker.shares[moved] = giver.shares.pop(moved)
    giver.shares[expert] = share
