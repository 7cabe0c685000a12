"""What a sparse layer is made of, and who holds which of its experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from nodeserve.model.quantised import Weight


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


class Group(Protocol):
    """The ranks that share a layer's experts."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_to_all(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        out_counts: Sequence[int],
        in_counts: Sequence[int],
    ) -> None:
        """Rows of x to each rank, `in_counts` of them, and of out from each, `out_counts`."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """Who holds which experts; an expert may be held by several ranks."""

    group: Group
    held: tuple[tuple[int, ...], ...]  # per rank

    @property
    def mine(self) -> tuple[int, ...]:
        return self.held[self.group.rank]


def evenly(num_experts: int, num_ranks: int) -> tuple[tuple[int, ...], ...]:
    """Consecutive experts for each rank, one more for the first ones where it does not come out."""
    each, more = divmod(num_experts, num_ranks)
    starts = [rank * each + min(rank, more) for rank in range(num_ranks + 1)]
    return tuple(tuple(range(a, b)) for a, b in zip(starts, starts[1:], strict=False))
