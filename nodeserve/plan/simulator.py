"""A node in virtual time: the policy of the live engine, simulated ranks, one heap of events.

Dispatcher, decode allocation, flow control, accounts and each rank's scheduler are the objects that
a live node runs; here the clock is a number and messages take `transit_s`. What happens at one
moment is one burst: its messages are all taken, then decisions fall, and when nothing more happens
at that moment, passes begin. The same scenario and arrivals give the same outcome, bit for bit.
"""

from collections.abc import Callable, Sequence
from random import Random

from nodeserve.errors import NodeServeError, Overloaded, WorkerLost
from nodeserve.plan.clock import Clock
from nodeserve.plan.handoffs import Handoffs
from nodeserve.plan.instances import (
    Instance,
    InstanceDone,
    QuietDone,
    Rank,
    RankDone,
    build_instances,
    smallest_limits,
)
from nodeserve.plan.lives import Life
from nodeserve.plan.quiet import QuietPasses
from nodeserve.plan.records import Arrival, Outcome, Pass, Scenario, Served
from nodeserve.plan.supervisor import Supervisor
from nodeserve.policy.decode_allocation import DecodeAllocator
from nodeserve.policy.dispatcher import Dispatcher
from nodeserve.policy.flow import Buffered, Verdict, judge
from nodeserve.policy.foresight import Foresight
from nodeserve.policy.lifecycle import Event, Phase
from nodeserve.policy.units import Departure, PassDone
from nodeserve.types import Load, Role, Sampling, Slo

MAX_IDLE_WAKES = 10_000  # in a row: a policy that only asks to be asked again is stuck


def simulate(scenario: Scenario, arrivals: Sequence[Arrival]) -> Outcome:
    """Serve `arrivals`; ConfigError when the scenario cannot be."""
    return Simulation(scenario, arrivals).run()


class Simulation:
    """One run: the coordinator's side, and what goes wrong."""

    def __init__(
        self, scenario: Scenario, arrivals: Sequence[Arrival], keeps_passes: bool = True
    ) -> None:
        self.scenario = scenario
        self.message_s = scenario.message_s
        self.clock = Clock()
        self.instances = build_instances(scenario)
        self.ranks = [rank for instance in self.instances for rank in instance.ranks]
        self.prompt_limits = smallest_limits(one for one in self.instances if one.prefills)
        self.limits = smallest_limits(one for one in self.instances if one.decodes)
        prefilling = [instance.units for instance in self.instances if instance.prefills]
        self.dispatcher = Dispatcher(prefilling, scenario.dispatch)
        self.handoffs = Handoffs(
            self.clock,
            self.instances,
            DecodeAllocator(
                scenario.decode_allocation, scenario.dispatch.max_num_seqs, scenario.block_size
            ),
            scenario.block_size,
            self.message_s,
        )
        self.foresight = Foresight(self.dispatcher, self.handoffs.allocator)
        self.handoffs.touched = self._touch
        self.handoffs.changed = self._changed
        self.handoffs.put_back = self._put_back
        self.supervisor = Supervisor(
            self.clock, self.instances, self.message_s, self._heard, self._lose
        )
        self.arrivals = sorted(arrivals, key=lambda arrival: arrival.arrived_s)
        self.lives: dict[int, Life] = {}
        self.served: list[Served | None] = [None] * len(self.arrivals)
        self.ended: Callable[[Served], None] = lambda served: None  # told of each request's end
        self.passes: list[Pass] = []  # that have ended, if they are kept
        self._keeps_passes = keeps_passes
        self.num_open = len(self.arrivals)
        self.num_arrived = self._num_idle_wakes = 0
        self._samplings: dict[int, Sampling] = {}
        self._touched: dict[Instance, None] = {}
        self._quiet = QuietPasses(self.message_s, self._pass_ended, self._quiet_report)
        self._undecided = False
        self._wake_s: float | None = None
        self._loss = Random(f"loss {scenario.seed}")
        self._learns = scenario.flow is not None or scenario.decode_allocation == "cost"

    def start(self) -> None:
        """Expect the first request, and what is to go wrong; then it is turn after turn."""
        self._expect_arrival()
        self.supervisor.expect(self.scenario.faults)

    def run(self) -> Outcome:
        """Until the last request has ended."""
        self.start()
        while self.num_open:
            if not self.turn():
                raise AssertionError(f"{self.num_open} requests wait for nothing")
        served = [one for one in self.served if one is not None]
        assert len(served) == len(self.arrivals)
        return Outcome(served, self.passes, self.clock.now_s)

    def turn(self) -> bool:
        """One moment: its messages, decisions, passes that begin; False if nothing is to come."""
        self._roll()
        if not self.clock.advance():
            return False
        self._quiet.act(self.clock.now_s)
        while self.clock.act() or self._undecided:
            if self._undecided:
                self._decide()
        self._begin_passes()
        return True

    def _roll(self) -> None:
        """To the next moment at which more happens than that whoever decodes gets a token. Nobody
        has to decide anything for these, unless somebody waits."""
        clock, quiet = self.clock, self._quiet
        while (now_s := quiet.next_s) < clock.next_s:
            clock.now_s = now_s
            quiet.act(now_s)
            while self._undecided:
                self._decide()
            self._begin_passes()

    # ---- arrivals

    def _expect_arrival(self) -> None:
        if self.num_arrived < len(self.arrivals):
            self.clock.at(self.arrivals[self.num_arrived].arrived_s, self._arrive)

    def _arrive(self, _: None) -> None:
        arrival, request_id = self.arrivals[self.num_arrived], self.num_arrived
        self.num_arrived += 1
        self._expect_arrival()
        num_output = arrival.num_output_tokens
        sampling = self._samplings.get(num_output)
        if sampling is None:
            sampling = self._samplings[num_output] = Sampling(max_tokens=num_output)
        life = self._live(request_id, arrival, sampling)
        try:
            self._admit(life)
        except NodeServeError as error:
            life.on(Event.CANCELLED)
            self._over(life, error.code)
        self._changed()

    def _live(self, request_id: int, arrival: Arrival, sampling: Sampling) -> Life:
        num_prompt = arrival.num_prompt_tokens
        max_len = min(num_prompt + arrival.num_output_tokens, self.limits.max_model_len)
        life = self.lives[request_id] = Life(request_id, arrival, num_prompt, max_len, sampling)
        return life

    def _admit(self, life: Life) -> None:
        now_s, flow = self.clock.now_s, self.scenario.flow
        tokens = life.tokens(now_s, handoff=False)
        self.limits.check_fits(tokens)
        tokens.handoff = True
        self.prompt_limits.check_fits(tokens)
        if flow is not None:
            waiting, arrival = life.waiting(self.scenario.block_size), life.arrival
            decoders, num_open = self.handoffs.decoders(), len(self.lives) - 1
            max_tokens = life.sampling.max_tokens
            forecast = self.foresight.forecast(waiting, max_tokens, decoders, num_open, now_s)
            buffered = Buffered(len(self.dispatcher), self.dispatcher.num_tokens)
            slo = Slo(arrival.ttft_slo_s, arrival.tpot_slo_s)
            judged = judge(flow, buffered, waiting.num_tokens, slo, forecast)
            self.foresight.judged(refused=judged.verdict is not Verdict.ADMIT)
            if judged.verdict is Verdict.REJECT:
                life.refused_for = judged.limit
                raise Overloaded(judged.reason)
            life.best_effort = judged.verdict is Verdict.BEST_EFFORT
            if not life.best_effort:
                life.forecast = forecast
        self.dispatcher.push(life.waiting(self.scenario.block_size), now_s)

    # ---- decisions

    def _changed(self) -> None:
        self._undecided = True
        self._num_idle_wakes = 0

    def _wake(self, _: None) -> None:
        self._wake_s = None
        self._undecided = True
        self._num_idle_wakes += 1
        assert self._num_idle_wakes < MAX_IDLE_WAKES, "the policy only asks to be asked again"

    def _decide(self) -> None:
        """Once for all that happened at this moment."""
        now_s = self.clock.now_s
        self._undecided = False
        self.handoffs.place()
        decision = self.dispatcher.decide(now_s)
        for departure in decision.departures:
            self._depart(departure)
        for number in decision.probes:
            self.supervisor.probe(self.instances[number])
        wake_s = decision.wake_s
        if wake_s is not None and (self._wake_s is None or wake_s < self._wake_s):
            assert wake_s > now_s, "a wish to be asked again now"
            self._wake_s = wake_s
            self.clock.at(wake_s, self._wake)

    def _depart(self, departure: Departure) -> None:
        now_s, sent = self.clock.now_s, []
        for waiting, unit in departure.boarded:
            life = self.lives[waiting.request_id]
            life.on(Event.ADMITTED)
            life.holder = unit
            life.num_rounds = waiting.rounds
            if life.first_token_s is None:
                life.departed_s = now_s
                life.prefill_worker = unit
            sent.append(life)
        self.clock.after(self.message_s, self._deliver, (departure.instance, sent))

    def _deliver(self, departed: tuple[int, list[Life]]) -> None:
        now_s, (number, sent) = self.clock.now_s, departed
        self.instances[number].close_door()
        self._touched[self.instances[number]] = None
        for life in sent:
            rank = self.ranks[life.holder]
            instance = self.instances[rank.unit.instance]
            if instance.alive:
                rank.submit(life.tokens(now_s, handoff=instance.role is Role.PREFILL))
                self._touched[instance] = None

    # ---- passes

    def _touch(self, instance: Instance) -> None:
        self._touched[instance] = None

    def _begin_passes(self) -> None:
        """What may have something to do now, starts."""
        if not self._touched:
            return
        touched, self._touched = self._touched, {}
        for instance in touched:
            begun = instance.begin(self.clock.now_s)
            if begun is not None:
                when_s, runs = begun
                if runs and instance.is_quiet:
                    self._quiet.begin(when_s, instance)
                else:
                    self.clock.at(when_s, self._pass_over if runs else self._touch, instance)
                if runs and instance.num_stages > 1 and (again := instance.look_again()):
                    self.clock.at(again[0], self._touch, instance)

    def _pass_ended(self, instance: Instance) -> None:
        if self._keeps_passes:
            assert instance.last is not None
            self.passes.append(instance.last)
        self._touched[instance] = None

    def _quiet_report(self, instance: Instance, done: QuietDone) -> None:
        """Of a pass whose work was nothing but decodes, and of whom nobody ended."""
        self._take_news(instance, *done)
        if len(self.dispatcher) or self.handoffs.parked:
            self._changed()

    def _pass_over(self, instance: Instance) -> None:
        if not instance.alive:
            return
        done = instance.end()
        self._pass_ended(instance)
        self.clock.after(self.message_s, self._report, (instance, done))

    def _report(self, told: tuple[Instance, InstanceDone]) -> None:
        """A pass's records, of all ranks. Lost ones take the news for the policy with them, not the
        tokens; only those of prefill passes get lost."""
        instance, done = told
        if instance.lost:
            return
        loss = self.scenario.faults.report_loss
        lossy = loss > 0.0 and any(work.prefill_tokens for work in done.record.ranks)
        if not lossy or self._loss.random() >= loss:
            self._take_news(instance, done.record, done.step, [one.load for one in done.ranks])
        for rank, rank_done in zip(instance.ranks, done.ranks, strict=True):
            self._take_tokens(instance, rank, done.record, rank_done)
        self._changed()

    def _take_news(
        self, instance: Instance, record: Pass, step: int, loads: Sequence[Load]
    ) -> None:
        _, began_s, seconds, _, works = record
        for rank, load, work in zip(instance.ranks, loads, works, strict=True):
            unit = rank.unit
            unit.account.report(load)
            if instance.prefills:
                word = PassDone(step, began_s, seconds, work)
                self.dispatcher.on_pass(unit.index, word, self.clock.now_s)
        if instance.decodes:
            if self._learns and not any([work.prefill_tokens for work in works]):
                self.handoffs.allocator.observe(works, seconds)
            self.handoffs.room_changed()

    def _take_tokens(self, instance: Instance, rank: Rank, record: Pass, told: RankDone) -> None:
        lives = self.lives
        for sequence in told.started:
            life = lives[sequence.request_id]
            if life.first_token_s is None:
                life.received_s, life.started_s = sequence.received_s, record.began_s
        for request_id in told.prefilled:
            life = lives[request_id]
            self._first_token(life, record)
            if instance.role is Role.PREFILL:
                life.on(Event.KV_READY)
                life.source = rank.unit.index
                self.handoffs.park(life)
            else:
                life.on(Event.PREFILLED)
                life.decode_worker = rank.unit.index
        for request_id in told.finished:
            life = lives[request_id]
            if life.phase is Phase.PREFILL:
                self._first_token(life, record)
            life.on(Event.FINISHED)
            self.handoffs.finish(life)
            self.foresight.ended(*life.stay(self.clock.now_s))
            self._over(life, "length")
        for request_id, num_tokens in told.preempted:
            life = lives[request_id]
            life.num_tokens = num_tokens
            life.on(Event.PREEMPTED)
            self._put_back(life)

    def _first_token(self, life: Life, record: Pass) -> None:
        life.num_tokens += 1
        if life.first_token_s is None:
            life.prefilled_s = record.began_s + record.seconds
            life.first_token_s = self.clock.now_s
            if life.forecast is not None:
                ttft_s = life.first_token_s - life.arrival.arrived_s
                self.foresight.first_token(life.forecast, ttft_s)

    def _put_back(self, life: Life) -> None:
        """A preempted request, or one whose worker is gone, waits again."""
        self.handoffs.allocator.forget(life.request_id)
        life.num_preemptions += 1
        life.forecast = None
        life.holder = life.source = -1
        self.dispatcher.push(life.waiting(self.scenario.block_size), self.clock.now_s)
        self._changed()

    def _over(self, life: Life, outcome: str) -> None:
        num_output = life.max_len - life.arrival.num_prompt_tokens
        served = life.served(self.clock.now_s, outcome, num_output)
        self.served[life.request_id] = served
        del self.lives[life.request_id]
        self.num_open -= 1
        self.ended(served)

    # ---- what goes wrong

    def _heard(self, instance: Instance) -> None:
        self.dispatcher.heard(instance.index, self.clock.now_s)
        self.handoffs.room_changed()
        self._changed()

    def _lose(self, instance: Instance) -> None:
        """An instance is declared dead: what it held waits again, with the tokens it has."""
        mine = {rank.unit.index: rank for rank in instance.ranks}
        self.dispatcher.lose(instance.index)
        self.handoffs.lose(instance)
        for life in list(self.lives.values()):
            rank = mine.get(life.holder)
            if rank is None:
                continue
            if life.phase is Phase.MOVING:
                self.handoffs.again(life)
                continue
            if life.phase is Phase.DECODE:
                life.num_tokens = rank.num_tokens(life.request_id)
            life.on(Event.WORKER_LOST)
            self._put_back(life)
        self._changed()
        self._end_if_alone()

    def _end_if_alone(self) -> None:
        """Without a worker of one phase a node ends, and all its requests with it."""
        left = [instance for instance in self.instances if not instance.lost]
        if any(one.prefills for one in left) and any(one.decodes for one in left):
            return
        self.clock.clear()
        self._quiet.clear()
        self._undecided = False
        for life in list(self.lives.values()):
            self._over(life, WorkerLost.code)
        while self.num_arrived < len(self.arrivals):
            arrival = self.arrivals[self.num_arrived]
            self.clock.now_s = max(self.clock.now_s, arrival.arrived_s)
            life = self._live(self.num_arrived, arrival, Sampling())
            self.num_arrived += 1
            self._over(life, WorkerLost.code)
