"""From the policy's decisions to records in the workers' rings.

The policy (policy/dispatcher.py, decode_allocation.py, flow.py) knows units, tokens and times. Here
it is told what happened, and what it decides is carried out, once for each turn of the loop.

Always true: a request that waits is in the dispatcher's buffer, or in `suspects` until its trial;
one that is parked is in `parked`, and no other is; what a worker's account has booked leaves for
that worker in the same order.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nodeserve.coordinator.admission import Limits
from nodeserve.coordinator.link import WorkerLink
from nodeserve.coordinator.policies import Policies
from nodeserve.coordinator.request import Request
from nodeserve.coordinator.tracer import Tracer
from nodeserve.errors import Overloaded
from nodeserve.policy.blocks import blocks_for
from nodeserve.policy.cost import RankWork
from nodeserve.policy.decode_allocation import DecodeAllocator, ReadyKv
from nodeserve.policy.dispatcher import Dispatcher
from nodeserve.policy.flow import NO_OBJECTIVE, Buffered, Verdict, judge
from nodeserve.policy.foresight import Forecast, Foresight
from nodeserve.policy.lifecycle import Event, Phase
from nodeserve.policy.parked import ParkedQueue
from nodeserve.policy.suspects import Suspects
from nodeserve.policy.units import Departure, PassDone, Unit
from nodeserve.types import Role, Slo
from nodeserve.wire.messages import Probe, Prompt, StepDone


class Dispatch:
    """Owns the policy's objects. `requests` is the coordinator's, by id."""

    def __init__(
        self,
        links: Sequence[WorkerLink],
        requests: Mapping[int, Request],
        limits: Limits,
        policies: Policies,
        tracer: Tracer,
    ) -> None:
        self.instances = by_instance(links)  # the ranks of each, in their present lives
        self.policies = policies
        self.parked = ParkedQueue()  # prefilled, pages pinned, no decode room yet
        self.suspects = Suspects()
        self._links = links
        self._requests = requests
        self._limits = limits
        self._tracer = tracer
        self._units = [
            Unit(
                link.index,
                link.instance,
                link.account,
                link.role is not Role.PREFILL,
                link.shape.pp,
            )
            for link in links
        ]
        prefills = [ranks for ranks in self.instances.values() if ranks[0].prefills]
        self.dispatcher = Dispatcher(
            [[self._units[link.index] for link in ranks] for ranks in prefills], policies.dispatch
        )
        self.allocator = DecodeAllocator(
            policies.decode_allocation, policies.dispatch.max_num_seqs, limits.block_size
        )
        self._decoders = [self._units[link.index] for link in links if link.pulls and link.leads]
        self.foresight = Foresight(self.dispatcher, self.allocator)
        self.num_departures = 0  # with somebody on board
        self._departures = 0
        self._lost: set[int] = set()  # instances
        self._stand_ins: set[int] = set()  # instances that decode, and take prompts for now
        self._asked: dict[int, set[int]] = {}  # instance: ranks that have not answered its probe
        # Workers whose every step is a pass to the dispatcher: a mixed one's decodes are not, but
        # in lockstep all ranks have to be heard.
        self._every_step = {
            link.index
            for ranks in self.instances.values()
            for link in ranks
            if len(ranks) > 1 or link.role is Role.PREFILL
        }
        # Of each instance that decodes, what its ranks, by worker, said of its newest step.
        self._seen: dict[int, dict[int, StepDone]] = {
            link.instance: {} for link in links if link.pulls
        }

    # ---- requests come and go

    def check(self, request: Request, now_s: float) -> None:
        """May it come in? Overloaded says why not, and when to try again."""
        dispatcher, waiting = self.dispatcher, request.waiting
        slo = request.objective = objective({**self.policies.slo, **(request.slo or {})})
        buffered = Buffered(len(dispatcher), dispatcher.num_tokens)
        facts = self.policies.flow, buffered, waiting.num_tokens, slo
        forecast = None if slo == NO_OBJECTIVE else self._forecast(request, now_s)
        judged = judge(*facts, forecast)
        if forecast is not None:
            self.foresight.judged(refused=judged.verdict is not Verdict.ADMIT)
        if judged.verdict is Verdict.REJECT:
            if slo == NO_OBJECTIVE:  # for want of room: when there is some only matters now
                judged = judge(*facts, self._forecast(request, now_s))
            raise Overloaded(judged.reason, judged.retry_after_s)
        waiting.best_effort = judged.verdict is Verdict.BEST_EFFORT
        request.forecast = None if waiting.best_effort else forecast

    def _forecast(self, request: Request, now_s: float) -> Forecast | None:
        return self.foresight.forecast(
            request.waiting, request.max_tokens, self._decoders, len(self._requests), now_s
        )

    def push(self, request: Request, now_s: float) -> None:
        """It waits for prefill."""
        self.dispatcher.push(request.waiting, now_s)

    def put_back(self, request: Request, now_s: float) -> None:
        """It waits for prefill again, a suspect for its trial before that: since its first arrival,
        with the tokens it has by now."""
        request.forecast = None
        num_blocks = request.num_blocks(self._limits.block_size)
        request.waiting = replace(
            request.waiting, num_tokens=len(request.tokens), num_blocks=num_blocks
        )
        self.allocator.forget(request.request_id)
        if request.is_suspect:
            self.suspects.add(request.waiting)
        else:
            self.dispatcher.push(request.waiting, now_s)

    def park(self, request: Request) -> None:
        """Its pages wait for room on the decode side, perhaps again."""
        block_size = self._limits.block_size
        num_blocks = request.num_blocks(block_size)
        longest = min(request.num_prompt_tokens + request.max_tokens, self._limits.max_model_len)
        growth = max(0, blocks_for(longest, block_size) - num_blocks)
        request.parked_blocks = num_blocks
        self.allocator.forget(request.request_id)
        self.parked.push(ReadyKv(request.request_id, num_blocks, growth), request.waiting.priority)

    def first_token(self, request: Request, now_s: float) -> None:
        """Its first token is here: what was forecast for it can be compared."""
        if request.forecast is not None:
            self.foresight.first_token(request.forecast, now_s - request.stamps.arrived)

    def finish(self, request: Request, now_s: float) -> None:
        """It ended by itself: how it grew, and how long it took, is what others can expect."""
        grown = request.num_blocks(self._limits.block_size) - request.parked_blocks
        self.allocator.forget(request.request_id, grown)
        decode_s = now_s - (request.stamps.first_token or now_s)
        num_gaps = request.num_output_tokens - 1
        self.foresight.ended(request.forecast, decode_s, num_gaps)

    def remove(self, request: Request) -> None:
        """It waits for nothing any more and is nowhere, wherever it stood or was."""
        self.dispatcher.remove(request.request_id)
        self.suspects.remove(request.request_id)
        self.parked.remove(request.request_id)
        self.allocator.forget(request.request_id)

    @property
    def num_queued(self) -> int:
        """Those that wait for prefill."""
        return len(self.dispatcher) + len(self.suspects)

    def queue(self) -> list[dict[str, Any]]:
        """How many wait for prefill, by class, first the one that goes first. O(requests)."""
        classes = Counter(
            (-request.waiting.priority, request.waiting.best_effort)
            for request in self._requests.values()
            if request.phase is Phase.WAITING
        )
        return [
            {"priority": -behind, "best_effort": best_effort, "requests": count}
            for (behind, best_effort), count in sorted(classes.items())
        ]

    # ---- what workers say; their accounts have their loads

    def on_step(self, link: WorkerLink, step: StepDone, now_s: float) -> None:
        """A step of a worker is over."""
        if step.attention or link.index in self._every_step:
            done = PassDone(step.step, step.began_s, step.step_s, work_of(step))
            self.dispatcher.on_pass(link.index, done, now_s)
        if link.pulls:
            seen = self._seen[link.instance]
            newest = next(iter(seen.values())).step if seen else step.step
            if step.step < newest:
                return  # of those before enough was learned
            if step.step > newest:
                seen.clear()
            seen[link.index] = step

    def on_alive(self, link: WorkerLink, now_s: float) -> None:
        """A probe's answer. The instance lives when all its ranks have answered."""
        instance = link.instance
        asked = self._asked.get(instance, set())
        asked.discard(link.index)
        if not asked and link.prefills:
            self.dispatcher.heard(instance, now_s)

    def lose(self, link: WorkerLink) -> None:
        """A worker is gone, and with it its instance: the ranks of one cannot go on alone."""
        instance = link.instance
        if instance in self._lost:
            return
        self._lost.add(instance)
        self._decoders = [unit for unit in self._decoders if unit.instance != instance]
        self.dispatcher.lose(instance)
        self._share_phases()

    def join(self, ranks: Sequence[WorkerLink]) -> None:
        """A lost instance is back: new links, empty."""
        instance = ranks[0].instance
        self._lost.remove(instance)
        ranks = self.instances[instance] = [link for link in ranks if link.leads]
        for link in ranks:
            self._units[link.index].account = link.account
        if instance in self._seen:
            self._seen[instance] = {}
            self._decoders += [self._units[link.index] for link in ranks]
        self._asked.pop(instance, None)
        self.dispatcher.join(instance)
        self._share_phases()

    @property
    def anyone_pulls(self) -> bool:
        """Whether pages that wait can be decoded by somebody."""
        return bool(self._decoders)

    def _share_phases(self) -> None:
        """While nobody is left for a phase, all that are left do both. What they have begun then
        they finish, also when those of the phase are back."""
        alive = {
            instance: ranks
            for instance, ranks in self.instances.items()
            if instance not in self._lost
        }
        roles = {ranks[0].role for ranks in alive.values()}
        alone = roles in ({Role.PREFILL}, {Role.DECODE})
        for link in self._links:  # those that follow as well: their leaders' steps are theirs
            if link.instance in alive:
                link.stands_in = alone
        stand_ins = set(alive) if roles == {Role.DECODE} else set()
        for instance in self._stand_ins - stand_ins:
            self.dispatcher.dismiss(instance)
        for instance in stand_ins - self._stand_ins:
            self.dispatcher.enlist([self._units[link.index] for link in alive[instance]])
        self._stand_ins = stand_ins

    # ---- decisions

    def turn(self, now_s: float) -> float | None:
        """Hand out what can start now; returns when to look again if nothing comes before."""
        self._learn()
        self._try_suspect(now_s)
        self._start_pulls(now_s)
        decision = self.dispatcher.decide(now_s)
        for departure in decision.departures:
            self._depart(departure, now_s)
        for instance in decision.probes:
            self._probe(instance)
        return decision.wake_s

    def _learn(self) -> None:
        for instance, steps in self._seen.items():
            if len(steps) == len(self.instances[instance]):
                ranks = list(steps.values())
                if not any(step.num_prefill_tokens for step in ranks):
                    seconds = max(step.step_s for step in ranks)
                    self.allocator.observe([work_of(step) for step in ranks], seconds)
                steps.clear()

    def _try_suspect(self, now_s: float) -> None:
        """The next one, when it has shown whether the last one is why workers ended."""
        suspects = self.suspects
        if suspects.on_trial is not None and not self._requests[suspects.on_trial].is_suspect:
            suspects.remove(suspects.on_trial)
        if (waiting := suspects.next()) is not None:
            self.dispatcher.push(waiting, now_s)

    def _start_pulls(self, now_s: float) -> None:
        for request_id, index in self.parked.place(self.allocator, self._decoders):
            self._pull(self._requests[request_id], self._links[index], now_s)

    def _pull(self, request: Request, link: WorkerLink, now_s: float) -> None:
        request.holder = link.index
        request.handoff_wait_s += now_s - request.stamps.parked
        request.on(Event.PULLING)
        self._tracer.pulls(request, now_s)
        link.send(request.pull_message())

    def _depart(self, departure: Departure, now_s: float) -> None:
        """One record for each worker that gets some of it, or waits for its share of it."""
        self.num_departures += bool(departure.boarded)
        prompts: dict[int, list[Prompt]] = {}
        for waiting, index in departure.boarded:
            request = self._requests[waiting.request_id]
            request.holder = request.prefill_worker = index
            request.on(Event.ADMITTED)
            if request.stamps.first_token is None:
                request.stamps.depart(now_s)
            request.handoff = self._links[index].acting is Role.PREFILL
            prompts.setdefault(index, []).append(request.prompt())
        boarded = [self._requests[waiting.request_id] for waiting, _ in departure.boarded]
        self._tracer.departed(departure.instance, boarded, now_s)
        number = 0
        if self.policies.dispatch.holds_door:
            self._departures += 1
            number = self._departures
            for link in self.instances[departure.instance]:
                prompts.setdefault(link.index, [])
        for index, batch in prompts.items():
            self._links[index].send_prompts(number, batch)

    def _probe(self, instance: int) -> None:
        """Ask, and do nothing else: silence is no death, only a process's end is."""
        ranks = [link for link in self.instances[instance] if link.alive]
        self._asked[instance] = {link.index for link in ranks}
        for link in ranks:
            link.send(Probe())


def objective(slo: Mapping[str, float]) -> Slo:
    """A request's `slo`, which is in milliseconds."""
    ttft_ms, tpot_ms = slo.get("ttft_ms"), slo.get("tpot_ms")
    return Slo(
        None if ttft_ms is None else ttft_ms / 1e3, None if tpot_ms is None else tpot_ms / 1e3
    )


def by_instance(links: Sequence[WorkerLink]) -> dict[int, list[WorkerLink]]:
    """The DP ranks of each instance: the leaders, one of which may be all of it."""
    instances: dict[int, list[WorkerLink]] = {}
    for link in links:
        if link.leads:
            instances.setdefault(link.instance, []).append(link)
    return instances


def work_of(step: StepDone) -> RankWork:
    return RankWork(step.num_prefill_tokens, step.attention, step.num_decodes, step.kv_tokens)
