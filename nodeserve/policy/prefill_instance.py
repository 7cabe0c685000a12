"""One prefill instance as dispatch sees it: is a pass running, when does it end, who is late.

    empty --departure--> running --all ranks report--> empty, or at the door (prompts are left)
    at the door --departure, with or without passengers--> running
    running --deadline--> suspect --any word from it--> at the door with twice the time, or empty

At the door the next pass waits for who may board it: it starts anyway, so a place that stays empty
is lost. That costs the way to the coordinator and back; boarding ahead of a predicted end instead
binds early, or misses the pass and waits for all of it (bench/LOG.md has the numbers).

A suspect gets no departures and is not counted among the instances. What a report would have said
and did not is in the next one, or in the answer to a probe; nothing here waits for a message that
may never come.
"""

import math
from collections.abc import Sequence

from nodeserve.policy.cost import IDLE, RankWork
from nodeserve.policy.pass_times import PassTimes
from nodeserve.policy.prefill_queue import PrefillQueue
from nodeserve.policy.units import PassDone, Unit

DEADLINE_PASSES = 3.0  # a pass that takes so many times its prediction is suspect
MIN_DEADLINE_S = 1.0
MAX_DEADLINE_PASSES = 10.0
FIRST_DEADLINE_S = 10.0  # before any pass has shown how long one takes
PROBE_EVERY_S = 0.2
MAX_PROBE_EVERY_S = 5.0


class PrefillInstance:
    """Its units, the pass that runs, and what is known of the next one."""

    def __init__(
        self, units: Sequence[Unit], times: PassTimes, budget: int, holds_door: bool
    ) -> None:
        self.number = units[0].instance
        self.units = list(units)
        self.lost = False
        self.suspect = False
        self.departed_s = -math.inf
        self.ends_s = math.inf  # of the running pass, predicted
        self.at_door = False  # a pass ended with prompts left: the next one waits for a Departure
        self.turn = 0  # of round-robin allocation
        self.probe_s = math.inf  # when to ask next
        self._times = times
        self._budget = budget
        num_stages = units[0].num_stages
        self._holds_door = holds_door and not units[0].decodes and num_stages == 1
        self._ahead = budget * num_stages  # tokens that may wait behind a running pass
        self._queues = {unit.index: PrefillQueue() for unit in units}
        self._running: dict[int, int] = {}  # tokens by unit; none: no pass runs
        self._patience = 1.0
        self._probe_gap_s = PROBE_EVERY_S
        self._decoding = {unit.index: IDLE for unit in units}  # a mixed unit's last decodes
        self._step = -1
        self._reports: dict[int, PassDone] = {}  # of that step, by unit

    @property
    def takes_part(self) -> bool:
        return not (self.lost or self.suspect)

    @property
    def empty(self) -> bool:
        """No prompt token is outstanding: no pass runs, or only decodes in it."""
        return not self.outstanding_tokens

    @property
    def outstanding_tokens(self) -> int:
        num_tokens = 0
        for unit in self.units:  # asked for all the time: a sum() takes three times as long
            num_tokens += unit.account.outstanding_tokens
        return num_tokens

    @property
    def is_open(self) -> bool:
        """Whether it may be boarded now.

        Instances that hold the door can be boarded when no pass runs. A mixed one cannot wait, its
        decodes go on: what boards it joins the next step, which is never far. Nor can one with
        stages: while a pass is in one of them, the others want more.
        """
        return not self._holds_door or not self._running

    def rooms(self) -> dict[int, int]:
        """By unit index, prompt tokens that still fit the pass that begins next. With stages: the
        passes under way beside the one that ends next, and one behind them, so that chunks are full
        when their turn comes."""
        return {unit.index: self._room(unit) for unit in self.units}

    def opens_s(self, now_s: float) -> float:
        """When it can be boarded next, as far as can be told."""
        return now_s if self.is_open else max(now_s, self.ends_s)

    def takes_in_s(self, now_s: float, full_s: float) -> float:
        """When its least loaded unit begins a pass that has a place, if nobody else comes; passes
        take `full_s`. Inf while a pass runs of which nothing is predicted."""
        begins_s = max(now_s, self.ends_s) if self._running else now_s
        behind = min(unit.account.outstanding_tokens - self._taken(unit) for unit in self.units)
        return begins_s + behind // self._budget * full_s

    def boarded(self, unit: int, num_tokens: int) -> None:
        self._queues[unit].send(num_tokens)

    def depart(self, now_s: float, dispatch_s: float) -> None:
        """What was boarded is on its way."""
        self.departed_s = now_s
        self.at_door = False
        if not self._running:
            self._begin(now_s + dispatch_s, now_s)

    def on_pass(self, index: int, done: PassDone, now_s: float) -> list[RankWork] | None:
        """A rank's report; the work of all ranks once the last one of the pass has reported."""
        self.heard(now_s)
        if done.step < self._step:
            return None  # another rank's next one is known already, this one never will be whole
        if done.step > self._step:
            self._step, self._reports = done.step, {}
        self._reports[index] = done
        work = done.work
        if work.prefill_tokens:
            work = work._replace(prefill_tokens=0, attention=0.0)
        self._decoding[index] = work
        if len(self._reports) < len(self.units):
            return None
        works = [self._reports[one.index].work for one in self.units]
        self._patience = 1.0
        self._follow(done.began_s + done.seconds, now_s)
        return works

    def heard(self, now_s: float) -> None:
        """It lives. If it still works, it has twice the time from now; if nothing is left to do, it
        was in time and only its report was lost."""
        if self.suspect:
            self.suspect = False
            longest = MAX_DEADLINE_PASSES / DEADLINE_PASSES
            self._patience = 1.0 if self.empty else min(2.0 * self._patience, longest)
            self._follow(now_s, now_s)

    def settle(self) -> None:
        """What was outstanding may be gone without a pass that said so: cancelled, failed.

        Not so while some ranks have reported a pass and others are about to.
        """
        if not (self._running or self.at_door) or self.suspect or not self.empty:
            return
        if not 0 < len(self._reports) < len(self.units):
            self._end()

    def check(self, now_s: float) -> bool:
        """Whether it is to be probed now."""
        if now_s < self.probe_s:
            return False
        if not self.suspect:
            self.suspect = True
            self._probe_gap_s = PROBE_EVERY_S
        else:
            self._probe_gap_s = min(2.0 * self._probe_gap_s, MAX_PROBE_EVERY_S)
        self.probe_s = now_s + self._probe_gap_s
        return True

    def lose(self) -> None:
        self.lost = True
        self.probe_s = math.inf

    def join(self) -> None:
        """Back, with accounts that start anew."""
        self.lost = self.suspect = False
        self._patience = 1.0
        self._decoding = {unit.index: IDLE for unit in self.units}
        self._step, self._reports = -1, {}
        self._end()
        for queue in self._queues.values():
            queue.sync(0)

    def next_pass(self) -> list[RankWork]:
        """The work of the pass that begins with what is outstanding now."""
        works = []
        for unit in self.units:
            queue = self._queues[unit.index]
            queue.sync(unit.account.outstanding_tokens)
            decoding = self._decoding[unit.index]
            tokens, attention, *_ = queue.work(self._budget - decoding.num_decodes)
            works.append(decoding._replace(prefill_tokens=tokens, attention=attention))
        return works

    def _room(self, unit: Unit) -> int:
        account = unit.account
        following = account.outstanding_tokens - self._taken(unit)
        return self._ahead - account.load.num_running - following

    def _taken(self, unit: Unit) -> int:
        """Tokens of this unit that the running pass computes."""
        taken = self._running.get(unit.index, 0)
        return min(taken, unit.account.outstanding_tokens)

    def _follow(self, ended_s: float, now_s: float) -> None:
        self._end()
        if self.empty:
            return
        if self._holds_door:
            self.at_door = True
        else:
            self._begin(ended_s, now_s)

    def _begin(self, began_s: float, now_s: float) -> None:
        works = self.next_pass()
        self._running = {
            unit.index: work.prefill_tokens for unit, work in zip(self.units, works, strict=True)
        }
        predicted_s = self._times.predict_s(works)
        if predicted_s is None:
            self.probe_s = now_s + FIRST_DEADLINE_S
            return
        self.ends_s = began_s + predicted_s
        patience_s = max(DEADLINE_PASSES * predicted_s, MIN_DEADLINE_S) * self._patience
        self.probe_s = max(began_s, now_s) + patience_s

    def _end(self) -> None:
        self._running = {}
        self.at_door = False
        self.ends_s = self.probe_s = math.inf
