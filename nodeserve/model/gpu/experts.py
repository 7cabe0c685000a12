"""Experts on a GPU: the matrices of all of them in two tensors, one grouped product for each.

Rows and group ends stay on the device, so a step with experts can be captured. What is left over
behind the last group's end belongs to nobody and is not read.
"""

from collections.abc import Callable

import torch

from nodeserve.model.expert_parts import Mlp
from nodeserve.model.gpu import pointwise
from nodeserve.model.quantised import dense


class GpuGrouped:
    """`Grouped` with torch's grouped product."""

    def __init__(
        self, num_mlps: int, mlp: Callable[[int], Mlp], dtype: torch.dtype, device: torch.device
    ) -> None:
        for place in range(num_mlps):
            gate, up, down = (dense(one) for one in mlp(place))
            if place == 0:
                inner, hidden = gate.shape
                shape = (num_mlps, 2 * inner, hidden)
                self._gate_up = torch.empty(shape, dtype=dtype, device=device)
                self._down = torch.empty(num_mlps, hidden, inner, dtype=dtype, device=device)
            self._gate_up[place, :inner].copy_(gate)
            self._gate_up[place, inner:].copy_(up)
            self._down[place].copy_(down)

    def __call__(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        if x.size(0) == 0:
            return x
        ends = counts.cumsum(0, dtype=torch.int32)
        gate_up = torch._grouped_mm(x, self._gate_up.transpose(1, 2), offs=ends)
        middle = x.new_empty(x.size(0), self._down.size(2))
        pointwise.silu_mul(gate_up, middle)
        return torch._grouped_mm(middle, self._down.transpose(1, 2), offs=ends)
