"""A Dispatcher's whole life in virtual time: requests, cancels, deaths, messages that take time.

The node's side does what a coordinator does and checks at every decision what must hold then;
`Node.run` returns when nothing is to come any more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from nodeserve.plan.clock import Clock
from nodeserve.policy.account import Account
from nodeserve.policy.dispatcher import Dispatcher
from nodeserve.policy.units import Departure, Unit, Waiting
from tests.fakes.dispatch_instance import Instance, Job, Request, Told, World

MAX_IDLE_WAKES = 30  # in a row, with nothing between them; probes of silent instances are some
MAX_STANDSTILL_S = 20.0  # with somebody waiting; a lost report of a first pass alone costs 10
MAX_LIFE_S = 1000.0


@dataclass(frozen=True, slots=True)
class Death:
    """An instance falls silent; it is missed later, and comes back still later or never."""

    instance: int
    at_s: float
    missed_after_s: float
    back_after_s: float | None


@dataclass(slots=True, eq=False)
class Life:
    """A request as the node knows it."""

    request_id: int
    request: Request
    phase: Literal["waiting", "sent", "ended", "cancelled"] = "waiting"
    holder: int = -1  # index of the unit it was sent to
    rounds: int = 0

    @property
    def over(self) -> bool:
        return self.phase in ("ended", "cancelled")


class Node:
    """The owner of a dispatcher."""

    def __init__(
        self, world: World, requests: Sequence[Request], deaths: Sequence[Death], seed: int
    ) -> None:
        self.world = world
        self.clock = Clock()
        self.random = Random(seed)  # of reports that get lost
        num_ranks = len(world.lags_s)
        self.units = [
            Unit(index, index // num_ranks, Account(world.num_blocks), world.decodes)
            for index in range(world.num_instances * num_ranks)
        ]
        self.groups = [
            self.units[first : first + num_ranks] for first in range(0, len(self.units), num_ranks)
        ]
        self.instances = [self._start(number) for number in range(world.num_instances)]
        self.dispatcher = Dispatcher(self.groups, world.options)
        self.lives: list[Life] = []
        self._undecided = False
        self._wake_s: float | None = None
        self._num_idle_wakes = 0
        self._moved_s = 0.0  # when somebody last left the buffer, or began to wait alone
        for request in requests:
            self.clock.at(request.arrives_s, self._arrive, request)
        for death in deaths:
            self.clock.at(death.at_s, self._kill, death)

    def run(self) -> None:
        """Until nobody has anything to do or to wait for."""
        while self.clock.advance():
            assert self.clock.now_s < MAX_LIFE_S, "it never comes to rest"
            while self.clock.act() or self._undecided:
                if self._undecided:
                    self._decide()

    def serve(self, request: Request) -> Life:
        """One more request, and all that follows from it."""
        self.clock.at(request.arrives_s, self._arrive, request)
        self.run()
        return self.lives[-1]

    def hear_all(self) -> None:
        """Every rank says once more what it holds."""
        for instance in self.instances:
            instance.answer(None)
        self.run()

    def _start(self, number: int) -> Instance:
        return Instance(self.world, self.groups[number], self.clock, self.random, self._hear)

    # ---- requests

    def _arrive(self, request: Request) -> None:
        life = Life(len(self.lives), request)
        self.lives.append(life)
        expected = self.dispatcher.predict(self._waiting(life), self.clock.now_s)
        assert expected is None or all(0.0 <= stage_s < float("inf") for stage_s in expected)
        self._push(life)
        if request.cancelled_after_s is not None:
            self.clock.after(request.cancelled_after_s, self._cancel, life)

    def _waiting(self, life: Life) -> Waiting:
        request = life.request
        return Waiting(
            life.request_id,
            request.num_tokens,
            request.num_blocks,
            request.arrives_s,
            request.priority,
            request.best_effort,
            life.rounds,
        )

    def _push(self, life: Life) -> None:
        if not len(self.dispatcher):
            self._moved_s = self.clock.now_s
        life.phase, life.holder = "waiting", -1
        self.dispatcher.push(self._waiting(life), self.clock.now_s)
        self._changed()

    def _cancel(self, life: Life) -> None:
        if life.over:
            return
        assert self.dispatcher.remove(life.request_id) == (life.phase == "waiting")
        if life.phase == "sent":
            instance = self._holder(life)
            which = life.request_id, life.holder
            self.clock.after(self.world.transit_s, instance.cancel, which)
        life.phase = "cancelled"
        self._changed()

    def _holder(self, life: Life) -> Instance:
        return self.instances[self.units[life.holder].instance]

    # ---- what instances say

    def _hear(self, told: Told) -> None:
        instance, unit = told.instance, told.rank.unit
        if instance.lost:
            return
        for request_id in told.ended:
            life = self.lives[request_id]
            assert life.holder == unit.index
            assert life.phase in ("sent", "cancelled")
            if life.phase == "sent":
                life.phase = "ended"
        if told.load is not None:
            unit.account.report(told.load)
        if told.done is not None and (told.done.work.prefill_tokens or len(instance.ranks) > 1):
            self.dispatcher.on_pass(unit.index, told.done, self.clock.now_s)
        if told.is_answer:
            instance.unanswered.discard(unit.index)
            if not instance.unanswered:
                self.dispatcher.heard(unit.instance, self.clock.now_s)
        self._changed()

    # ---- deaths

    def _kill(self, death: Death) -> None:
        instance = self.instances[death.instance]
        if instance.alive:
            instance.alive = False
            self.clock.after(death.missed_after_s, self._lose, death)

    def _lose(self, death: Death) -> None:
        self.instances[death.instance].lost = True
        self.dispatcher.lose(death.instance)
        for life in self.lives:
            if life.phase == "sent" and self.units[life.holder].instance == death.instance:
                self._push(life)
        if death.back_after_s is not None:
            self.clock.after(death.back_after_s, self._join, death.instance)
        self._changed()

    def _join(self, number: int) -> None:
        for unit in self.groups[number]:
            unit.account = Account(self.world.num_blocks)
        self.instances[number] = self._start(number)
        self.dispatcher.join(number)
        self._changed()

    # ---- decisions

    def _changed(self) -> None:
        self._undecided = True
        self._num_idle_wakes = 0

    def _wake(self, wake_s: float) -> None:
        if wake_s == self._wake_s:
            self._wake_s = None
            self._undecided = True
            self._num_idle_wakes += 1
            assert self._num_idle_wakes <= MAX_IDLE_WAKES, "it only asks to be asked again"

    def _decide(self) -> None:
        """Once for all that happened at this moment."""
        self._undecided = False
        now_s = self.clock.now_s
        decision = self.dispatcher.decide(now_s)
        leaving = [departure.instance for departure in decision.departures]
        assert len(set(leaving)) == len(leaving)
        for departure in decision.departures:
            self._depart(departure)
        for number in decision.probes:
            self._probe(self.instances[number])
        self._check_buffer(any(one.boarded for one in decision.departures))
        wake_s = decision.wake_s
        assert wake_s is None or wake_s > now_s, "a wish to be asked again now"
        if wake_s is not None and wake_s != self._wake_s:
            self.clock.at(wake_s, self._wake, wake_s)
        self._wake_s = wake_s

    def _depart(self, departure: Departure) -> None:
        instance, batch = self.instances[departure.instance], []
        assert not instance.lost
        for waiting, index in departure.boarded:
            life = self.lives[waiting.request_id]
            assert life.phase == "waiting" and index in instance.ranks
            life.phase, life.holder, life.rounds = "sent", index, waiting.rounds
            batch.append((Job(life.request_id, life.request), index))
        self.clock.after(self.world.transit_s, instance.take, batch)

    def _probe(self, instance: Instance) -> None:
        assert not instance.lost
        instance.unanswered = set(instance.ranks)
        self.clock.after(self.world.transit_s, instance.answer)

    def _check_buffer(self, some_left: bool) -> None:
        """Who was not handed out is in the buffer, and not for long without anybody leaving it."""
        waiting = [life.request.num_tokens for life in self.lives if life.phase == "waiting"]
        assert len(self.dispatcher) == len(waiting)
        assert self.dispatcher.num_tokens == sum(waiting)
        if waiting or some_left:
            assert self.clock.now_s - self._moved_s <= MAX_STANDSTILL_S
        if some_left:
            self._moved_s = self.clock.now_s
