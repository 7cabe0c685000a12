"""A dispatcher told what happens, event by event."""

from nodeserve.policy.account import Account
from nodeserve.policy.cost import RankWork
from nodeserve.policy.dispatcher import Dispatcher
from nodeserve.policy.units import DispatchOptions, PassDone, Unit, Waiting
from nodeserve.types import Load

BLOCKS = 10_000
BUDGET = 100


class Node:
    """A dispatcher and what its workers would have: nothing happens unless a test says so."""

    def __init__(
        self,
        num_instances: int = 2,
        num_ranks: int = 1,
        decodes: bool = False,
        **options: object,
    ) -> None:
        self.units = [
            Unit(place, place // num_ranks, Account(BLOCKS), decodes)
            for place in range(num_instances * num_ranks)
        ]
        groups = [self.units[at : at + num_ranks] for at in range(0, len(self.units), num_ranks)]
        self.dispatcher = Dispatcher(
            groups,
            DispatchOptions(budget=BUDGET, **options),  # type: ignore[arg-type]
        )
        self.received = [0] * len(self.units)
        self.steps = [0] * num_instances
        self.next_id = 0

    def push(self, now_s: float, *lengths: int, **fields: object) -> list[int]:
        ids = []
        for num_tokens in lengths:
            self.next_id += 1
            ids.append(self.next_id)
            waiting = Waiting(self.next_id, num_tokens, 1, now_s, **fields)  # type: ignore[arg-type]
            self.dispatcher.push(waiting, now_s)
        return ids

    def decide(self, now_s: float) -> dict[int, list[int]]:
        """Instances that left now and the ids on board."""
        departed = {}
        for departure in self.dispatcher.decide(now_s).departures:
            departed[departure.instance] = [one.request_id for one, _ in departure.boarded]
            for _, unit in departure.boarded:
                self.received[unit] += 1
        return departed

    def wake_s(self, now_s: float) -> float | None:
        decision = self.dispatcher.decide(now_s)
        assert not decision.departures
        return decision.wake_s

    def load(self, unit: int, left: int = 0, pinned: int = 0, free: int = BLOCKS) -> None:
        load = Load(0, bool(left), pinned, free, left, self.received[unit])
        self.units[unit].account.report(load)

    def end_pass(
        self, instance: int, began_s: float, now_s: float, tokens: int = 50, left: int = 0
    ) -> None:
        """All ranks report; `left` tokens are left on the first."""
        self.steps[instance] += 1
        ranks = [unit for unit in self.units if unit.instance == instance]
        for place, unit in enumerate(ranks):
            self.load(unit.index, left if place == 0 else 0)
            work = RankWork(tokens, tokens * tokens / 2)
            done = PassDone(self.steps[instance], began_s, now_s - began_s, work)
            self.dispatcher.on_pass(unit.index, done, now_s)

    def learn(self, pass_s: float = 1.0) -> float:
        """A few passes of each instance, one after the other; when the last one ended."""
        now_s = 0.0
        for _ in range(4):
            for _ in self.steps:
                self.push(now_s, 50)
                [left] = self.decide(now_s)
                self.end_pass(left, now_s, now_s + pass_s)
                now_s += pass_s
        return now_s


def learn_lengths(node: Node, now_s: float) -> float:
    """Passes whose time is that of their tokens, 10 ms each."""
    for tokens in (10, 100, 30, 60, 10, 100):
        node.push(now_s, tokens)
        [left] = node.decide(now_s)
        node.end_pass(left, now_s, now_s + tokens / 100, tokens)
        now_s += tokens / 100
    return now_s
