"""A device that computes nothing: it takes the time that a pass would, and makes tokens up."""

import math
from collections.abc import Callable

from nodeserve.policy.batching import Batch, Work
from nodeserve.policy.cost import IDLE, rank_work
from nodeserve.wire.messages import pack_floats, pack_ids
from nodeserve.worker.alarm import Alarm
from nodeserve.worker.contract import ALONE, Logprobs, Sampled, Team
from nodeserve.worker.lockstep import Lockstep


class Tokens:
    """Which token follows: a function of the last one, its position and, of a sampled request, its
    seed. So no batch, worker, preemption or handoff can change a stream, and a seed that is lost on
    the way shows. Never one of `eos_token_ids`."""

    def __init__(self, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        assert any(token_id not in eos_token_ids for token_id in range(vocab_size))
        self._vocab_size = vocab_size
        self._never = frozenset(eos_token_ids)

    def after(self, token_id: int, position: int, seed: int = 0) -> int:
        """The token behind `token_id`, which has this position (from 0)."""
        chosen = (token_id * 31 + position * 17 + 7 + seed) % self._vocab_size
        while chosen in self._never:
            chosen = (chosen + 1) % self._vocab_size
        return chosen

    def logprobs(self, row: int, token_id: int, num_top: int) -> Logprobs:
        """As if each token had half the probability of the one before it, the chosen one 1/2."""
        count = min(num_top, self._vocab_size)
        top_ids = [(token_id + place) % self._vocab_size for place in range(count)]
        values = [-(place + 1) * math.log(2) for place in range(max(count, 1))]
        return Logprobs(row, values[0], pack_ids(top_ids), pack_floats(values[:count]))

    def sampled(self, batch: Batch) -> Sampled:
        """What a step with this batch gives."""
        sampling = [work for work in batch.work if work.samples]
        token_ids = [self._next(work) for work in sampling]
        asked = [work.sequence.sampling.logprobs for work in sampling]
        logprobs = [
            self.logprobs(row, token_id, num_top)
            for row, (token_id, num_top) in enumerate(zip(token_ids, asked, strict=True))
            if num_top is not None
        ]
        return Sampled(token_ids, logprobs or None)

    def _next(self, work: Work) -> int:
        last, sampling = work.start + work.num_tokens - 1, work.sequence.sampling
        seed = 0 if sampling.greedy else sampling.seed or 0
        return self.after(work.sequence.token_ids[last], last, seed)


class SimFlight:
    """A pass on its way."""

    def __init__(self, lockstep: Lockstep, number: int, sampled: Sampled) -> None:
        self._lockstep = lockstep
        self._number = number
        self._sampled = sampled

    def done(self) -> bool:
        return self._lockstep.over(self._number) is not None

    def result(self) -> Sampled:
        """At once, also before the end: no page is written, and when an instance stops the other
        ranks may never enter this pass."""
        return self._sampled._replace(ran=self._lockstep.over(self._number))


class SimExecutor:
    """Passes in lockstep with the other workers of the instance. A follower's part of a pass is to
    enter it, of whatever stage it is: then it cannot begin without it, as no collective could."""

    overlaps = False

    def __init__(
        self, lockstep: Lockstep, alarm: Alarm, tokens: Tokens, team: Team = ALONE
    ) -> None:
        self._lockstep = lockstep
        self._alarm = alarm
        self._tokens = tokens
        self._team = team
        self._told_s = 0.0  # when the first stage opens, as the alarm knows it

    def opens_s(self) -> float:
        return self._lockstep.opens_s()

    def called(self, departure: int) -> bool:
        return self._lockstep.called(departure)

    def on_done(self, wake: Callable[[], None]) -> None:
        self._alarm.start(self._look, wake)

    def _look(self) -> float | None:
        """The loop hears of the end of a pass, and of the first stage's before it."""
        at_s, opens_s = self._lockstep.look(), self._lockstep.opens_s()
        if at_s is not None and self._told_s < opens_s < at_s:
            self._told_s = opens_s
            self._alarm.wake_at(opens_s)
        return at_s

    def launch(self, batch: Batch) -> SimFlight:
        self._team.step(bytes)
        number = self._lockstep.enter(rank_work(batch))
        return SimFlight(self._lockstep, number, self._tokens.sampled(batch))

    def leave(self) -> bool:
        """No flight waits for other ranks."""
        return False

    def follow(self, plan: bytes) -> None:
        self._lockstep.enter(IDLE)

    def num_passed(self) -> int:
        return 0

    def choose(self) -> None:
        """Tokens are made up by leaders."""
