"""Dispatch on arrival: the baselines, and what is left when the window cannot be trusted."""

from collections.abc import Callable, Sequence

from nodeserve.policy.prefill_instance import PrefillInstance
from nodeserve.policy.units import DispatchOptions, Unit


class Immediate:
    """A request goes to a unit's queue at once, whatever runs there. O(units)."""

    def __init__(self, options: DispatchOptions) -> None:
        self._admission = options.admission
        self._turn = 0
        self._unit_turns: dict[int, int] = {}

    def pick(self, instances: Sequence[PrefillInstance], falling_back: bool) -> Unit:
        if falling_back or self._admission == "shortest-queue":
            return _least(instances, lambda unit: unit.account.outstanding_tokens)
        if self._admission == "fewest-requests":
            return _least(instances, lambda unit: unit.account.num_sequences)
        return self._next(instances)

    def _next(self, instances: Sequence[PrefillInstance]) -> Unit:
        """Rotates over the instances, and over the units of each."""
        instance = instances[self._turn % len(instances)]
        self._turn += 1
        turn = self._unit_turns.get(instance.number, 0)
        self._unit_turns[instance.number] = turn + 1
        return instance.units[turn % len(instance.units)]


def _least(instances: Sequence[PrefillInstance], load: Callable[[Unit], int]) -> Unit:
    """The unit with the least load; of equals, that of the least loaded instance."""
    best, best_key = instances[0].units[0], None
    for instance in instances:
        loads = [load(unit) for unit in instance.units]
        total = sum(loads)
        for unit, own in zip(instance.units, loads, strict=True):
            if best_key is None or (own, total) < best_key:
                best, best_key = unit, (own, total)
    return best
