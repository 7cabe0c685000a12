"""Experts that are spread over ranks, of all layers: who holds which, and what was sent to whom.

A layer's rows are counted where they leave (`Exchanged`), by one addition to a tensor that stays on
the device. Nobody reads it while a step runs but who asks for `rows`, which waits for the device.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from nodeserve.model.expert_parts import Exchange, Spread, evenly
from nodeserve.model.group import Group


class Rows(NamedTuple):
    """What this rank's rows asked for, as wire.experts.ExpertsCounted has it. All int64."""

    layers: torch.Tensor  # [n] those with experts that we have
    experts: torch.Tensor  # [n, num_experts]
    ranks: torch.Tensor  # [n, ranks]: who computed them


class SpreadExperts:
    """Of one worker. `held`: by layer, where they are not held evenly."""

    def __init__(
        self,
        group: Group,
        num_experts: int,
        device: torch.device,
        held: Mapping[int, Spread] | None = None,
    ) -> None:
        self._group = group
        self._num_experts = num_experts
        self._device = device
        self._held = held or {}
        self._evenly = evenly(num_experts, group.size)
        self._exchanges: dict[int, Exchange] = {}

    def exchange(self, layer: int) -> Exchange:
        """Of a layer, to bind its experts with; called once for each."""
        assert layer not in self._exchanges, layer
        held = self._held.get(layer, self._evenly)
        made = self._exchanges[layer] = Exchange.between(self._group, held, self._device)
        return made

    @torch.inference_mode()  # as the model is built in
    def forget(self) -> None:
        """Count from 0."""
        for exchange in self._exchanges.values():
            exchange.rows.zero_()

    def rows(self) -> Rows:
        """Since `forget`, on the host."""
        layers = torch.tensor(list(self._exchanges), dtype=torch.int64)
        if not self._exchanges:
            return Rows(layers, layers.view(0, 1), layers.view(0, 1))
        # One copy for all layers: each would wait for the device.
        counted = torch.cat([one.rows for one in self._exchanges.values()]).cpu()
        sizes = [one.rows.numel() for one in self._exchanges.values()]
        experts, ranks = [], []
        for exchange, slots in zip(
            self._exchanges.values(), torch.split(counted, sizes), strict=True
        ):
            numbers = torch.tensor([expert for held in exchange.held for expert in held])
            experts.append(slots.new_zeros(self._num_experts).index_add_(0, numbers, slots))
            parts = torch.split(slots, [len(held) for held in exchange.held])
            ranks.append(torch.stack([part.sum() for part in parts]))
        return Rows(layers, torch.stack(experts), torch.stack(ranks))
