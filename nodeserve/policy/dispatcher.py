"""From the buffer to the prefill instances: when a batch departs, to whom, with what.

The live coordinator and the simulator drive the same object: they tell it what happened and at what
time, and carry out what `decide` returns. It has no clock and does no I/O.

Always true: a request is in the buffer, or was handed out in exactly one Departure. A batch waits
for a timer only as the window says, and for nothing else but an instance with room: if nobody is
heard of any more, or most are suspects, requests are dispatched on arrival instead.

Two kinds of departure: an instance that goes on to another pass anyway takes whoever fits it,
whatever the window says, since an empty place in that pass is lost for good; one that would stop
takes its turn, the one that left longest ago first, which is what keeps departures staggered.
"""

import math
from collections.abc import Sequence, Set

from nodeserve.policy.boarding import Boarding
from nodeserve.policy.buffer import Buffer
from nodeserve.policy.cost import RankWork
from nodeserve.policy.filled import Filled
from nodeserve.policy.immediate import Immediate
from nodeserve.policy.pass_times import PassTimes
from nodeserve.policy.prefill_allocation import book, uncached
from nodeserve.policy.prefill_instance import PrefillInstance
from nodeserve.policy.units import (
    IMMEDIATE,
    Decision,
    Departure,
    DispatchOptions,
    PassDone,
    Unit,
    Wait,
    Waiting,
)
from nodeserve.policy.window import Mean, Moment, Window

HISTORY_PASSES = 16  # per instance: what mean pass times are taken over
SILENCE_PASSES = 5.0  # nobody's pass ended for so many: the window is not to be trusted
MIN_SILENCE_S = 1.0
UNKNOWN_AFTER_S = 1.0


class Dispatcher:
    """Owns the buffer. `instances` are lists of their units, in the order of their numbers."""

    def __init__(self, instances: Sequence[Sequence[Unit]], options: DispatchOptions) -> None:
        self.options = options
        self.times = PassTimes(HISTORY_PASSES * len(instances))
        self.instances: list[PrefillInstance] = []
        self.window = Window(_fixed_s(options), options.window_k)
        self.falling_back = False
        self.filled = Filled()
        self._by_number: dict[int, PrefillInstance] = {}
        self._by_unit: dict[int, PrefillInstance] = {}
        for units in instances:
            self.enlist(units)
        self._buffer = Buffer(longest_first=len(instances) > 1)
        self._boarding = Boarding(self._buffer, self.times, options)
        self._immediate = Immediate(options)
        self._feedback = Mean()  # end of a pass to our knowing it, seconds
        self._dispatch = Mean()  # departure to the start of the pass it was for
        self._awaited: dict[int, float] = {}  # departures to empty instances, by number
        self._heard_s = -math.inf  # when a pass last ended or an idle node got work
        self._good_in_a_row = 0

    def __len__(self) -> int:
        return len(self._buffer)

    @property
    def num_tokens(self) -> int:
        """Prompt tokens in the buffer."""
        return self._buffer.num_tokens

    def prefills(self, unit: Unit) -> bool:
        """Whether prompts go to this unit."""
        return unit.index in self._by_unit

    # ---- what happens

    def push(self, waiting: Waiting, now_s: float) -> None:
        """A request arrives, or comes back (its `arrived_s` is the first arrival)."""
        self._buffer.push(waiting)
        self.window.arrived(now_s)

    def remove(self, request_id: int) -> bool:
        """Take a request out, wherever it stands; False if it does not wait here."""
        return self._buffer.remove(request_id) is not None

    def on_pass(self, index: int, done: PassDone, now_s: float) -> None:
        """The unit with this index ended a pass; its account has the report."""
        instance = self._by_unit.get(index)
        if instance is None:  # one that was dismissed finishes what it had
            return
        was_suspect = instance.suspect
        works = instance.on_pass(index, done, now_s)
        if works is None:
            return
        self._heard_s = now_s
        self._feedback.add(now_s - done.began_s - done.seconds)
        if any(work.prefill_tokens for work in works):
            self._learn(instance.number, works, done)
        self._good_in_a_row = 0 if was_suspect else self._good_in_a_row + 1
        if self._good_in_a_row >= len(self.instances):
            self.falling_back = False

    def heard(self, instance: int, now_s: float) -> None:
        """A suspect answered a probe, and its accounts have what it said."""
        self._by_number[instance].heard(now_s)
        self._awaited.pop(instance, None)  # of that pass, nothing more may be said
        self._heard_s = now_s

    def lose(self, instance: int) -> None:
        """An instance is gone; what it held is pushed again by the caller. One that does not
        prefill is none of ours."""
        if instance in self._by_number:
            self._by_number[instance].lose()

    def join(self, instance: int) -> None:
        """An instance is back, empty, with new accounts in its units. One that does not prefill is
        none of ours."""
        self._awaited.pop(instance, None)
        if instance in self._by_number:
            self._by_number[instance].join()

    def enlist(self, units: Sequence[Unit]) -> None:
        """One more instance takes prompts."""
        options = self.options
        instance = PrefillInstance(units, self.times, options.budget, options.holds_door)
        self.instances.append(instance)
        self._by_number[instance.number] = instance
        self._by_unit.update((unit.index, instance) for unit in units)

    def dismiss(self, instance: int) -> None:
        """One takes no more; what it has is its own business."""
        gone = self._by_number.pop(instance)
        self.instances.remove(gone)
        for unit in gone.units:
            del self._by_unit[unit.index]
        self._awaited.pop(instance, None)

    def _learn(self, number: int, works: list[RankWork], done: PassDone) -> None:
        self.times.observe(works, done.seconds)
        self.filled.count(works, self.options.budget, done.seconds)
        num_tokens = sum(work.prefill_tokens for work in works)
        self.window.constancy.add(num_tokens, done.seconds)
        departed_s = self._awaited.pop(number, None)
        if departed_s is not None:
            self._dispatch.add(max(0.0, done.began_s - departed_s))
        self._buffer.token_s = (
            self.times.level_s(self.options.budget, len(works)) / self.options.budget
        )
        self.window.pass_s = self.times.mean_s
        self.window.dead_s = self._feedback.value + self._dispatch.value

    # ---- decisions

    def decide(self, now_s: float) -> Decision:
        """What departs now; call it after every event and at the `wake_s` of the last answer."""
        for instance in self.instances:
            instance.settle()
        probes = [one.number for one in self.instances if not one.lost and one.check(now_s)]
        self._mistrust(now_s)
        if self.options.admission in IMMEDIATE or self.falling_back:
            departures, wake_s = self._leave_at_once(now_s), math.inf
        else:
            departures, wake_s = self._leave_in_turn(now_s)
        alive = [one for one in self.instances if not one.lost]
        wake_s = min([wake_s, self._silence_s(alive), *(one.probe_s for one in alive)])
        return Decision(departures, probes, wake_s if math.isfinite(wake_s) else None)

    def predict(self, waiting: Waiting, now_s: float) -> Wait | None:
        """What a newcomer like this can expect before its first token; None: nobody knows.

        That is so before any pass has shown how long one takes, and where none has ended for
        UNKNOWN_AFTER_S and the node is empty: else an estimate that is too high, by which everybody
        is refused, would never be corrected.

        First what an instance has is computed, then requests before it board as whole passes that
        come in turn, then its own passes run. Meant low rather than high: what shares its passes is
        not counted.
        """
        alive = self._alive() or self.instances
        idle = not self._buffer and all(one.empty for one in alive)
        if self.times.mean_s is None or (idle and now_s > self._heard_s + UNKNOWN_AFTER_S):
            return None
        budget, num_units = self.options.budget, len(alive[0].units)
        full_s = self._buffer.token_s * budget or self.times.level_s(budget, num_units)
        batches = self._buffer.tokens_ahead(waiting) // (budget * num_units)
        takes_in_s = min(one.takes_in_s(now_s, full_s) for one in alive)
        if not math.isfinite(takes_in_s):
            takes_in_s = now_s + self.times.mean_s / len(alive)
        own, rest = divmod(waiting.num_tokens, budget)
        own_s = own * full_s + (self.times.level_s(rest, 1) if rest else 0.0)
        begins_s = takes_in_s + batches * full_s / len(alive)
        return Wait(begins_s - now_s, own_s + self.window.dead_s)

    def _leave_in_turn(self, now_s: float) -> tuple[list[Departure], float]:
        departures: list[Departure] = []
        wake_s = math.inf
        if not self._buffer and not any(one.at_door for one in self.instances):
            return departures, wake_s
        tried: set[int] = set()
        while open_now := [one for one in self._alive() if one.is_open and one.number not in tried]:
            waits = [one for one in open_now if one.at_door]
            if not waits and not self._buffer:
                break
            # Of those that are empty whoever left longest ago: that keeps the rotation.
            instance = min(
                waits or open_now, key=lambda one: (one.outstanding_tokens, one.departed_s)
            )
            if not waits:
                leaves_s = self.window.leaves_s(self._moment(instance, now_s))
                if leaves_s > now_s:
                    wake_s = leaves_s
                    break
            tried.add(instance.number)
            if departure := self._depart(instance, tried, now_s):
                departures.append(departure)
        return departures, wake_s

    def _alive(self) -> list[PrefillInstance]:
        return [one for one in self.instances if one.takes_part]

    def _moment(self, leaving: PrefillInstance, now_s: float) -> Moment:
        others = [one for one in self._alive() if one is not leaving]
        return Moment(
            now_s=now_s,
            num_waiting=len(self._buffer),
            oldest_arrival_s=self._buffer.oldest_arrival_s(),
            is_full=self._buffer.num_tokens >= self.options.budget * len(leaving.units),
            free_s=sorted(one.opens_s(now_s) for one in others),
        )

    def _depart(self, instance: PrefillInstance, tried: Set[int], now_s: float) -> Departure | None:
        """`tried` were offered what waits, this one among them: of these, none that is still open
        comes into question for the rest."""
        was_empty, alive = instance.empty, self._alive()
        others = [one for one in alive if not (one.is_open and one.number in tried)]
        boarded = self._boarding.board(instance, others, now_s, may_split=len(alive) == 1)
        if not boarded and not instance.at_door:
            return None
        for waiting, unit in boarded:
            instance.boarded(unit, uncached(waiting, unit))
        instance.depart(now_s, self._dispatch.value)
        if boarded:
            self.window.departed(now_s)
            self._buffer.departed()
        if was_empty:
            self._awaited[instance.number] = now_s
            self._heard_s = max(self._heard_s, now_s)
        return Departure(instance.number, boarded)

    # ---- without a window

    def _leave_at_once(self, now_s: float) -> list[Departure]:
        alive = [one for one in self.instances if not one.lost]
        usable = [one for one in alive if not one.suspect] or alive
        if not usable:
            return []
        boarded: dict[int, list[tuple[Waiting, int]]] = {}
        while (waiting := self._buffer.first()) is not None:
            self._buffer.remove(waiting.request_id)
            unit = self._immediate.pick(usable, self.falling_back)
            self._by_number[unit.instance].boarded(unit.index, book(unit, waiting))
            boarded.setdefault(unit.instance, []).append((waiting, unit.index))
        for one in alive:
            if one.at_door:
                boarded.setdefault(one.number, [])
        for number in boarded:
            self._by_number[number].depart(now_s, self._dispatch.value)
        return [Departure(number, batch) for number, batch in boarded.items()]

    def _mistrust(self, now_s: float) -> None:
        """Fall back when most instances are suspects, or all run and none ends a pass for long."""
        alive = [one for one in self.instances if not one.lost]
        suspects = sum(one.suspect for one in alive)
        if 2 * suspects > len(alive) or now_s >= self._silence_s(alive):
            self.falling_back, self._good_in_a_row = True, 0

    def _silence_s(self, alive: list[PrefillInstance]) -> float:
        """When to give the window up if no pass ends before, with requests waiting."""
        if self.falling_back or not self._buffer or any(one.empty for one in alive) or not alive:
            return math.inf
        mean_s = self.times.mean_s
        if mean_s is None:
            return math.inf
        return self._heard_s + max(SILENCE_PASSES * mean_s, MIN_SILENCE_S)


def _fixed_s(options: DispatchOptions) -> float | None:
    return options.window_s if options.admission == "staggered" else 0.0
