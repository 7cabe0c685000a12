"""What a newcomer can expect, and how far that can be believed.

Under overload a queue grows until the next request would be refused, so all who come in stand right
at the limit: half of them miss it if predictions are right on average, all of them if they are low.
So predictions are compared with what came of them, and an SLO is held against what most do not
exceed (`safe_*`). How many "most" are follows the share of requests that are refused: while nobody
is, a refusal is a loss as sure as a miss; where most are, another takes the place at once.

What a request takes alone it takes anyway, and what others add is never thought more than CUT times
as long: a margin that has become too wide cannot keep everybody out, and so does not stay so.

For the first token the dispatcher says how long those before it take. For the time of a token a
step is predicted with all that are open, as if none of them ended and no more came; whoever is
beyond what the decoders hold waits for the end of others.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from nodeserve.policy.cost import RankWork
from nodeserve.policy.decode_allocation import FIRST_SHARE, DecodeAllocator
from nodeserve.policy.dispatcher import Dispatcher
from nodeserve.policy.units import Unit, Wait, Waiting

SURE = 0.9  # of a predicted time: less than that it hardly takes
SPREADS = 3.0  # mean errors above the mean; fewer where few are refused
FLOODED = 0.5  # share of the requests that is refused from which all of SPREADS counts
MEMORY = 64  # requests by which predictions are corrected
CUT = 4.0  # times the prediction: what took longer had other reasons (a compilation, a death)
FULL_SHARE = 0.9  # of the decoders' blocks; beyond that it is not steps that sequences wait for
SHORT = 0.1  # share of the answers that are called short


class Forecast(NamedTuple):
    """Seconds to the first token and for each one after it. `step` None: no step was seen yet.
    `stay_s`: what a mean answer takes after its first token."""

    first: Wait
    safe_ttft_s: float
    step: Wait | None = None
    safe_tpot_s: float | None = None
    stay_s: float = 0.0


class Margin:
    """What predictions have to be multiplied by. Long ones count in proportion: they are what
    limits are near to."""

    def __init__(self) -> None:
        self._num = 0
        self._predicted_s = self._actual_s = self._error_s = 0.0  # means

    @property
    def likely(self) -> float:
        return self._actual_s / self._predicted_s if self._num else 1.0

    def safe_s(self, predicted: Wait, spreads: float) -> float:
        """What most like this take at most: so many mean errors above the mean. Of what it takes
        alone, and of all before anything was seen, the least: a refusal takes certainty."""
        if not self._num:
            return SURE * predicted.whole_s
        factor = (self._actual_s + spreads * self._error_s) / self._predicted_s
        most_s = SURE * predicted.own_s + CUT * predicted.others_s
        return min(factor * predicted.whole_s, most_s)

    def learn(self, predicted: Wait, actual_s: float) -> None:
        """A request for which this was said took `actual_s`."""
        whole_s = predicted.whole_s
        if whole_s <= 0.0:
            return
        actual_s = min(max(actual_s, whole_s / CUT), whole_s * CUT)
        error_s = abs(actual_s - whole_s * self.likely) if self._num else 0.0
        self._num += 1
        weight = 1.0 / min(self._num, MEMORY)
        self._predicted_s += weight * (whole_s - self._predicted_s)
        self._actual_s += weight * (actual_s - self._actual_s)
        self._error_s += weight * (error_s - self._error_s)


class Foresight:
    """Learns from all requests; `decoders` are the units that may decode now."""

    def __init__(self, dispatcher: Dispatcher, allocator: DecodeAllocator) -> None:
        self._dispatcher = dispatcher
        self._allocator = allocator
        self._ttft, self._tpot = Margin(), Margin()
        self._answers = _Answers()
        self._refused = 0.0  # share of the last requests

    def forecast(
        self,
        waiting: Waiting,
        max_tokens: int,
        decoders: Sequence[Unit],
        num_open: int,
        now_s: float,
    ) -> Forecast | None:
        """For a newcomer, to be answered with `max_tokens` at most, beside `num_open` requests that
        have come in and not ended; None where nothing is known. O(units)."""
        first = self._dispatcher.predict(waiting, now_s)
        if first is None:
            return None
        self._answers.expect(max_tokens)
        spreads = SPREADS * min(1.0, self._refused / FLOODED)
        crowd = _Crowd.of(waiting, decoders, self._allocator.max_num_seqs)
        num_held = min(num_open + 1.0, crowd.most)
        step = self._step(decoders, num_held, crowd.blocks_each)
        if step is None:
            return Forecast(first, self._ttft.safe_s(first, spreads))
        stay_s = self._answers.mean * step.whole_s
        rounds = (num_open + 1.0 - num_held) / crowd.most  # until there is a place for it
        if self._dispatcher.prefills(decoders[0]):  # not without a place to decode
            first = first._replace(others_s=first.others_s + rounds * stay_s)
        else:
            waits_s = rounds * step.whole_s * self._answers.mean / self._answers.short
            step = step._replace(others_s=step.others_s + waits_s)
        safe_ttft_s, safe_tpot_s = (
            self._ttft.safe_s(first, spreads),
            self._tpot.safe_s(step, spreads),
        )
        return Forecast(first, safe_ttft_s, step, safe_tpot_s, stay_s)

    def judged(self, *, refused: bool) -> None:
        """What was decided by a forecast."""
        self._refused += (refused - self._refused) / MEMORY

    def first_token(self, forecast: Forecast, ttft_s: float) -> None:
        """What came of it, for one that was never put back."""
        self._ttft.learn(forecast.first, ttft_s)

    def ended(self, forecast: Forecast | None, decode_s: float, num_gaps: int) -> None:
        """A request ended by itself, `decode_s` and so many tokens after its first. `forecast`
        None: it had none, or was put back."""
        self._answers.learn(num_gaps)
        if forecast is not None and forecast.step is not None and num_gaps:
            self._tpot.learn(forecast.step, decode_s / num_gaps)

    def _step(self, decoders: Sequence[Unit], num_held: float, blocks_each: float) -> Wait | None:
        """A mean step of an instance whose units decode so many sequences of such a length, evenly.
        None before one was seen."""
        if not decoders:
            return None
        first, tokens_each = decoders[0], int(blocks_each * self._allocator.block_size)
        num_ranks = sum(unit.instance == first.instance for unit in decoders)
        num_seqs = math.ceil(num_held / len(decoders))
        times = self._allocator.times
        own_s = times.predict_s([RankWork(0, 0.0, 1, tokens_each)] * num_ranks)
        work = RankWork(0, 0.0, num_seqs, num_seqs * tokens_each)
        step_s = times.predict_s([work] * num_ranks)
        if own_s is None or step_s is None:
            return None
        if self._dispatcher.prefills(first):
            step_s += self._prompts_s(work, tokens_each, num_ranks, step_s)
        return Wait(max(0.0, step_s - own_s), min(own_s, step_s))

    def _prompts_s(self, work: RankWork, tokens_each: int, num_ranks: int, step_s: float) -> float:
        """What prompts add to a mean step of a mixed instance: as many as sequences end in it."""
        num_prompts = (work.num_decodes - 1) / self._answers.mean
        room = max(0, self._dispatcher.options.budget - work.num_decodes)
        chunk = min(room, int(max(1.0, num_prompts) * tokens_each))
        work = work._replace(prefill_tokens=chunk, attention=chunk * tokens_each / 2)
        pass_s = self._dispatcher.times.predict_s([work] * num_ranks) or step_s
        return min(1.0, num_prompts) * max(0.0, pass_s - step_s)


class _Answers:
    """Tokens that requests get after their first: on average, and of short ones."""

    def __init__(self) -> None:
        self.mean = self.short = 1.0
        self._num = 0

    def expect(self, max_tokens: int) -> None:
        """Before anything is known, a part of what is asked for."""
        if not self._num:
            self.mean = self.short = max(1.0, FIRST_SHARE * max_tokens)

    def learn(self, num_gaps: int) -> None:
        num_gaps = max(1, num_gaps)
        self._num += 1
        if self._num == 1:
            self.mean = self.short = float(num_gaps)
        self.mean += (num_gaps - self.mean) / min(self._num, MEMORY)
        # Nine steps down weigh as much as one up: at rest where a tenth of the answers is shorter.
        if num_gaps < self.short:
            self.short = max(1.0, self.short * (1.0 - (1.0 - SHORT) * SHORT))
        else:
            self.short *= 1.0 + SHORT * SHORT


class _Crowd(NamedTuple):
    """Sequences like those that decode now: what each takes, and how many there is room for."""

    blocks_each: float
    most: float

    @staticmethod
    def of(waiting: Waiting, decoders: Sequence[Unit], max_num_seqs: int) -> "_Crowd":
        num_blocks, num_used, num_sequences = 0, waiting.num_blocks, 1
        for unit in decoders:
            account = unit.account
            num_blocks += account.num_blocks
            num_used += account.num_blocks - account.free_blocks
            num_sequences += account.num_sequences
        blocks_each = num_used / num_sequences
        most = min(max_num_seqs * len(decoders), FULL_SHARE * num_blocks / blocks_each)
        return _Crowd(blocks_each, max(1.0, most))
