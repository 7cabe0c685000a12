"""Which experts compute a token, and what each of them counts: the rules of all routers.

Every row is decided alone and in the same order of operations, so a token's experts and their
weights do not depend on what shares its step. Nothing here reads a tensor on the host.
"""

from typing import NamedTuple

import torch

from nodeserve.config import MoeConfig

TINY = 1e-20  # added to a sum of sigmoids, which may all be 0


class Routes(NamedTuple):
    """The experts of each row, the best first."""

    ids: torch.Tensor  # [rows, num_active] int64
    weights: torch.Tensor  # [rows, num_active] float32


def route(logits: torch.Tensor, moe: MoeConfig, bias: torch.Tensor | None = None) -> Routes:
    """logits [rows, num_experts] float32, overwritten perhaps; bias [num_experts] float32, if the
    model has one for the choice."""
    scores = _scores(logits, moe)
    choice = scores if bias is None else scores + bias
    if moe.num_active_groups < moe.num_groups:
        choice = _within_groups(choice, moe)
    ids = choice.topk(moe.num_active, dim=-1).indices
    weights = scores.gather(1, ids)
    if moe.normalize:
        weights = weights / (_sum_of(weights) + (TINY if moe.scoring == "sigmoid" else 0.0))
    return Routes(ids, weights * moe.routed_scale)


def _scores(logits: torch.Tensor, moe: MoeConfig) -> torch.Tensor:
    if moe.scoring == "softmax":
        return logits.softmax(-1)
    # In float64: a vector's last few elements are computed by other code than the rest, and which
    # those are depends on the number of rows. What differs there does not survive the rounding.
    return logits.double().sigmoid().float()


def _within_groups(choice: torch.Tensor, moe: MoeConfig) -> torch.Tensor:
    """The same, and minus infinity outside of the best groups."""
    grouped = choice.view(choice.size(0), moe.num_groups, choice.size(1) // moe.num_groups)
    if moe.group_score == "max":
        group_scores = grouped.amax(-1)
    else:
        best = grouped.topk(2, dim=-1).values
        group_scores = best[..., 0] + best[..., 1]
    best_groups = group_scores.topk(moe.num_active_groups, dim=-1).indices
    outside = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best_groups, False)
    return grouped.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(-2)


def _sum_of(weights: torch.Tensor) -> torch.Tensor:
    """[rows, 1], added up one after the other: the same bits for any number of rows."""
    total = weights[:, :1].clone()
    for column in range(1, weights.size(1)):
        total.add_(weights[:, column : column + 1])
    return total
