"""What a sparse layer is made of, and who holds which of its experts."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from nodeserve.model.group import Group
from nodeserve.model.quantised import Weight
from nodeserve.shards import share

Spread = tuple[tuple[int, ...], ...]  # the experts of each rank, rising


class Mlp(NamedTuple):
    """The matrices of one gated MLP: down(silu(gate(x)) * up(x))."""

    gate: Weight  # [inner, hidden]
    up: Weight  # [inner, hidden]
    down: Weight  # [hidden, inner]


class Router(NamedTuple):
    """What scores the experts."""

    weight: Weight  # [num_experts, hidden]
    bias: torch.Tensor | None  # [num_experts] float32, for the choice alone


class Shared(NamedTuple):
    """The MLP that computes every row beside the experts."""

    mlp: Mlp
    gate: Weight | None  # [1, hidden]: its part is weighed by the sigmoid of this product


@dataclass(frozen=True, slots=True)
class Exchange:
    """Who holds which experts of a layer, and what was sent to them. A slot is a place for an
    expert, rank by rank; an expert may be held by several ranks."""

    group: Group
    held: Spread  # of each rank
    rows: torch.Tensor  # [slots] int64: rows of this rank's, added up

    @staticmethod
    def between(group: Group, held: Spread, device: torch.device) -> "Exchange":
        num_slots = sum(map(len, held))
        return Exchange(group, held, torch.zeros(num_slots, dtype=torch.int64, device=device))

    @property
    def mine(self) -> tuple[int, ...]:
        return self.held[self.group.rank]


def evenly(num_experts: int, num_ranks: int) -> Spread:
    """Consecutive experts for each rank, as many as can be the same."""
    return tuple(tuple(share(num_experts, num_ranks, rank)) for rank in range(num_ranks))
