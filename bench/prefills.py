"""Prefill instances in virtual time around the real dispatcher, for bench.policy.

A whole simulation is plan.simulator; here the buffer stays as full as it was, workers cost next to
nothing, and the time spent in each call of the dispatcher is what counts.
"""

import heapq
import time
from collections import deque
from random import Random

from nodeserve.policy.account import Account
from nodeserve.policy.cost import RankWork
from nodeserve.policy.dispatcher import Dispatcher
from nodeserve.policy.profiles import profile_named
from nodeserve.policy.units import Departure, DispatchOptions, PassDone, Unit, Waiting
from nodeserve.types import Load

PROFILE = profile_named("moe-ep8")
BUDGET = PROFILE.max_num_batched_tokens
BLOCK_SIZE = 16
NUM_BLOCKS = PROFILE.num_kv_tokens // BLOCK_SIZE
NUM_RANKS = 8  # of an instance
now_ns = time.perf_counter_ns


class Clock:
    """Time spent in one kind of call."""

    def __init__(self) -> None:
        self.spent_ns = 0
        self.num_calls = 0

    def __enter__(self) -> None:
        self.num_calls += 1
        self.spent_ns -= now_ns()

    def __exit__(self, *_: object) -> None:
        self.spent_ns += now_ns()

    def us(self, count: int) -> float:
        return self.spent_ns / 1e3 / max(1, count)


def prompt_tokens(rng: Random) -> int:
    return max(16, min(int(rng.lognormvariate(7.0, 0.8)), 16_384))  # 1,500 on average


class Rank:
    """What a worker would hold: prompts in their order, computed up to the budget in each pass."""

    def __init__(self, index: int, instance: int) -> None:
        self.unit = Unit(index, instance, Account(NUM_BLOCKS))
        self.prompts: deque[list[int]] = deque()  # tokens left, blocks
        self.num_received = 0
        self.taken = 0

    def receive(self, waiting: Waiting) -> None:
        self.prompts.append([waiting.num_tokens, waiting.num_blocks])
        self.num_received += 1

    def begin(self) -> RankWork:
        self.taken = min(BUDGET, sum(tokens for tokens, _ in self.prompts))
        return RankWork(self.taken, self.taken * self.taken / 2)

    def end(self) -> Load:
        """Compute what was taken; a prompt that is done is gone with its blocks."""
        left = self.taken
        while left and self.prompts:
            done = min(left, self.prompts[0][0])
            self.prompts[0][0] -= done
            left -= done
            if not self.prompts[0][0]:
                self.prompts.popleft()
        used = sum(blocks for _, blocks in self.prompts)
        tokens = sum(tokens for tokens, _ in self.prompts)
        return Load(0, len(self.prompts), 0, NUM_BLOCKS - used, tokens, self.num_received)


class Prefills:
    """Instances in virtual time around a real dispatcher, with a buffer that stays as full."""

    def __init__(self, admission: str, num_instances: int, num_buffered: int) -> None:
        self.ranks = [
            [Rank(number * NUM_RANKS + rank, number) for rank in range(NUM_RANKS)]
            for number in range(num_instances)
        ]
        units = [[rank.unit for rank in ranks] for ranks in self.ranks]
        options = DispatchOptions(admission=admission, budget=BUDGET)
        self.dispatcher = Dispatcher(units, options)
        self.holds_door = options.holds_door  # a pass that follows waits for its departure
        self.num_buffered = num_buffered
        self.rng = Random(1)
        self.now_s = 0.0
        self.next_id = 0
        self.num_boarded = 0
        self.running: list[tuple[float, int, float, list[RankWork]]] = []  # by the time of its end
        self.steps = [0] * num_instances
        self.push, self.on_pass, self.decide = Clock(), Clock(), Clock()

    def run(self, num_passes: int) -> None:
        num_ended, wake_s = 0, None
        while num_ended < num_passes:
            while len(self.dispatcher) < self.num_buffered:
                self._arrive()
            if self.running and (wake_s is None or self.running[0][0] <= wake_s):
                self._end_pass()
                num_ended += 1
            elif wake_s is not None:
                self.now_s = max(self.now_s, wake_s)
            with self.decide:
                decision = self.dispatcher.decide(self.now_s)
            for departure in decision.departures:
                self._deliver(departure)
            wake_s = decision.wake_s

    def forget_times(self) -> None:
        """What came before was to warm up."""
        self.num_boarded = 0
        self.push, self.on_pass, self.decide = Clock(), Clock(), Clock()

    def _arrive(self) -> None:
        tokens = prompt_tokens(self.rng)
        waiting = Waiting(self.next_id, tokens, tokens // BLOCK_SIZE + 1, self.now_s)
        self.next_id += 1
        with self.push:
            self.dispatcher.push(waiting, self.now_s)

    def _deliver(self, departure: Departure) -> None:
        ranks = self.ranks[departure.instance]
        self.num_boarded += len(departure.boarded)
        for waiting, index in departure.boarded:
            ranks[index % NUM_RANKS].receive(waiting)
        if all(number != departure.instance for _, number, _, _ in self.running):
            self._begin_pass(departure.instance)

    def _begin_pass(self, number: int) -> None:
        works = [rank.begin() for rank in self.ranks[number]]
        seconds = PROFILE.cost.pass_s(works) * self.rng.gauss(1.0, PROFILE.noise)
        heapq.heappush(self.running, (self.now_s + seconds, number, self.now_s, works))

    def _end_pass(self) -> None:
        ended_s, number, began_s, works = heapq.heappop(self.running)
        self.now_s = max(self.now_s, ended_s)
        self.steps[number] += 1
        loads = [rank.end() for rank in self.ranks[number]]
        for rank, work, load in zip(self.ranks[number], works, loads, strict=True):
            done = PassDone(self.steps[number], began_s, ended_s - began_s, work)
            with self.on_pass:
                rank.unit.account.report(load)
                self.dispatcher.on_pass(rank.unit.index, done, self.now_s)
        if not self.holds_door and any(load.waiting_tokens for load in loads):
            self._begin_pass(number)
