"""Sparse layers: rows sorted by expert, computed expert by expert, added up with their weights.

The same code on every backend; a backend brings the router's product and `Grouped`, the MLPs that
this worker holds. With expert parallelism each rank has rows of its own and holds some of the
experts: the sorted rows go to where their experts are and come back (`Exchanged`). That is a
collective, so every rank runs every sparse layer in every step, with no rows if it has none.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from nodeserve.config import MoeConfig
from nodeserve.model.expert_parts import Exchange, Mlp, Router, Shared
from nodeserve.model.ops import Op
from nodeserve.model.quantised import Weight
from nodeserve.model.routing import route


class Grouped(Protocol):
    """Several MLPs, each on its own rows."""

    def __call__(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """x [num_rows, hidden] act, sorted by MLP; counts [num_mlps] int64, which may be 0.
        The result [num_rows, hidden] is act or float32, as the backend likes."""


class Held:
    """All experts on this worker."""

    def __init__(self, grouped: Grouped, num_experts: int) -> None:
        self._grouped = grouped
        self._num_experts = num_experts

    def __call__(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """x [rows, hidden] act, ids [rows, k] -> [rows, k, hidden], what each expert makes of it"""
        order, counts = sorted_by(ids.flatten(), self._num_experts)
        results = self._grouped(x[order // ids.size(1)], counts)
        return unsorted(results, order).view(*ids.shape, x.size(1))


class Exchanged:
    """Experts spread over the ranks of a group."""

    def __init__(
        self, grouped: Grouped, exchange: Exchange, num_experts: int, device: torch.device
    ) -> None:
        self._grouped = grouped
        self._group = exchange.group
        self._rows = exchange.rows
        self._num_slots = [len(held) for held in exchange.held]
        table, copies = _slots(exchange.held, num_experts)
        self._table, self._copies = table.to(device), copies.to(device)

    def __call__(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """x [rows, hidden] act, ids [rows, k] -> [rows, k, hidden], what each expert makes of it"""
        order, counts = sorted_by(self._slots_of(ids).flatten(), sum(self._num_slots))
        self._rows.add_(counts)
        to_ranks = [int(part.sum()) for part in torch.split(counts, self._num_slots)]
        wanted = self._exchange_counts(counts)  # [ranks, my slots]
        from_ranks = wanted.sum(1).tolist()

        received = x.new_empty(sum(from_ranks), x.size(1))
        self._group.all_to_all(received, x[order // ids.size(1)], from_ranks, to_ranks)
        results = self._compute(received, wanted)
        returned = results.new_empty(len(order), x.size(1))
        self._group.all_to_all(returned, results, to_ranks, from_ranks)
        return unsorted(returned, order).view(*ids.shape, x.size(1))

    def _slots_of(self, ids: torch.Tensor) -> torch.Tensor:
        """A slot for each: rows take the copies of an expert in turn, and ranks begin elsewhere."""
        turns = torch.arange(ids.size(0), device=ids.device).unsqueeze(1) + self._group.rank
        return self._table[ids, turns % self._copies[ids]]

    def _exchange_counts(self, counts: torch.Tensor) -> torch.Tensor:
        """[ranks, my slots] int64: how many rows each rank has for each of mine."""
        mine = self._num_slots[self._group.rank]
        wanted = counts.new_empty(self._group.size * mine, 1)
        each = [mine] * self._group.size
        self._group.all_to_all(wanted, counts.unsqueeze(1), each, self._num_slots)
        return wanted.view(self._group.size, mine)

    def _compute(self, received: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """received: rank by rank, each sorted by slot; the results lie in the same order."""
        slots = torch.arange(wanted.size(1), device=wanted.device).repeat(wanted.size(0))
        order, counts = sorted_by(slots.repeat_interleave(wanted.flatten()), wanted.size(1))
        return unsorted(self._grouped(received[order], counts), order)


def _slots(
    held: tuple[tuple[int, ...], ...], num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of each expert [num_experts, most copies] int64, and how many [num_experts] int64."""
    places: list[list[int]] = [[] for _ in range(num_experts)]
    for slot, expert in enumerate(expert for one in held for expert in one):
        places[expert].append(slot)
    most = max(map(len, places))
    table = torch.tensor([one + [0] * (most - len(one)) for one in places])
    return table, torch.tensor([len(one) for one in places])


def sorted_by(keys: torch.Tensor, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """keys [n] int64 below num_keys -> their stable order [n], how many of each [num_keys]"""
    counts = keys.new_zeros(num_keys).scatter_add_(0, keys, torch.ones_like(keys))
    return keys.argsort(stable=True), counts


def unsorted(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The row i of `rows` is put to `order[i]`."""
    return torch.empty_like(rows).index_copy_(0, order, rows)


class Experts:
    """One layer's router, experts, and what is shared; an `Op` from act to float32."""

    def __init__(
        self,
        moe: MoeConfig,
        logits: Op,
        bias: torch.Tensor | None,
        held: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        shared: Op | None,
    ) -> None:
        self._moe = moe
        self._logits = logits
        self._bias = bias
        self._held = held
        self._shared = shared

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """x [rows, hidden] act -> out [rows, hidden] float32"""
        logits = x.new_empty(x.size(0), self._moe.num_experts, dtype=torch.float32)
        self._logits(x, logits)
        ids, weights = route(logits, self._moe, self._bias)
        results = self._held(x, ids)
        if self._shared is None:
            out.zero_()
        else:
            self._shared(x, out)
        for place in range(ids.size(1)):  # one after the other: the same bits for any rows
            out.add_(results[:, place] * weights[:, place : place + 1])


class SharedExpert:
    """An `Op` from act to float32, weighed by its gate if it has one."""

    def __init__(self, mlp: Op, gate: Op | None) -> None:
        self._mlp = mlp
        self._gate = gate

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        self._mlp(x, out)
        if self._gate is not None:
            weights = x.new_empty(x.size(0), 1, dtype=torch.float32)
            self._gate(x, weights)
            out.mul_(weights.double().sigmoid().float())  # float64 as in routing


class GatedMlp:
    """An `Op` from act to float32: down(silu(gate(x)) * up(x))."""

    def __init__(self, parts: "Parts", mlp: Mlp) -> None:
        self._inner = mlp.gate.shape[0]
        self._gated = parts.gated(mlp.gate, mlp.up)
        self._down = parts.linear(mlp.down)

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        middle = x.new_empty(x.size(0), self._inner)
        self._gated(x, middle)
        self._down(middle, out)


class OneByOne:
    """`Grouped` as a loop over MLPs, for backends that are the processor itself."""

    def __init__(self, mlps: list[GatedMlp]) -> None:
        self._mlps = mlps

    def __call__(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(x.shape, dtype=torch.float32)
        first = 0
        for mlp, count in zip(self._mlps, counts.tolist(), strict=True):
            if count:
                mlp(x[first : first + count], out[first : first + count])
            first += count
        return out


class Parts(Protocol):
    """What a backend brings."""

    device: torch.device

    def gated(self, gate: Weight, up: Weight) -> Op:
        """As in `Ops`."""

    def linear(self, weight: Weight) -> Op:
        """As in `Ops`."""

    def float_linear(self, weight: Weight) -> Op:
        """weight [n, k], n small: x [rows, k] act -> out [rows, n] float32, not rounded to act"""

    def grouped(self, num_mlps: int, mlp: Callable[[int], Mlp]) -> Grouped:
        """`mlp(i)` is asked for once each, in order, and may be dropped afterwards."""


def make_experts(
    parts: Parts,
    moe: MoeConfig,
    router: Router,
    expert: Callable[[int], Mlp],
    shared: Shared | None,
    exchange: Exchange | None,
) -> Experts:
    """Bind a sparse layer's weights. `expert(i)` is asked only for those that this worker holds."""
    mine = range(moe.num_experts) if exchange is None else exchange.mine
    grouped = parts.grouped(len(mine), lambda place: expert(mine[place]))
    held: Held | Exchanged = Held(grouped, moe.num_experts)
    if exchange is not None:
        held = Exchanged(grouped, exchange, moe.num_experts, parts.device)
    beside = None
    if shared is not None:
        gate = None if shared.gate is None else parts.float_linear(shared.gate)
        beside = SharedExpert(GatedMlp(parts, shared.mlp), gate)
    return Experts(moe, parts.float_linear(router.weight), router.bias, held, beside)


def one_by_one(parts: Parts, num_mlps: int, mlp: Callable[[int], Mlp]) -> OneByOne:
    return OneByOne([GatedMlp(parts, mlp(place)) for place in range(num_mlps)])
