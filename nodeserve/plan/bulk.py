"""The scheduler of a simulated rank: the decisions of the real one, with its decodes in bulk.

Where nobody looks at tokens, every sequence that decodes gets one a pass, and what can happen to it
is known when it begins: at which pass it needs its next block, and at which it ends. So a pass
touches only those to whom something happens, and its work is a sum that is kept. What a shortage
of blocks asks for is not foreseeable: then all sequences are brought up to date, and the real
scheduler plans that pass.
"""

from collections import defaultdict
from dataclasses import dataclass, field

from nodeserve.policy.batching import LENGTH, Batch, Limits, Outcome, Sequence, Stage, Work
from nodeserve.policy.cost import RankWork, prefill_pairs, rank_work
from nodeserve.policy.scheduler import BY_ARRIVAL, Scheduler


@dataclass(slots=True)
class BulkBatch(Batch):
    """`work` has prompts only; `num_decodes` more sequences get a token, and `ends` their last."""

    kv_tokens: int = 0
    ends: list[Sequence] = field(default_factory=list)

    @property
    def is_quiet(self) -> bool:
        """Whether nothing comes of it but tokens, the last one of nobody."""
        return not (self.work or self.ends)


def chunks_of(batch: Batch) -> list[Work]:
    """The work on prompts."""
    return batch.work if isinstance(batch, BulkBatch) else batch.work[batch.num_decodes :]


def work_of(batch: Batch) -> RankWork:
    """The work of a planned batch."""
    if not isinstance(batch, BulkBatch):
        return rank_work(batch)
    pairs = prefill_pairs(batch.work) if batch.work else 0.0
    return RankWork(batch.num_prefill_tokens, pairs, batch.num_decodes, batch.kv_tokens)


class BulkScheduler(Scheduler):
    """Sequences that decode are as they were when they began, and `device_state` is the number of
    the first pass that they are in, until they end or all are brought up to date."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self._in_bulk = True
        self._number = 0  # of the next pass with decodes
        self._sum = 0  # context tokens of all that decode, in a pass with number 0
        self._growing: dict[int, list[Sequence]] = defaultdict(list)  # by number of a pass
        self._ending: dict[int, list[Sequence]] = defaultdict(list)

    def next_batch(self, ahead: bool = False, idle: bool = False) -> Batch | None:
        """As the real one's, whose options a simulated worker does not use."""
        assert not (ahead or idle or self._launched), "one batch at a time"
        batch = self._with_decodes()
        if self._waiting:
            self._plan_prefills(batch, len(self._running))
        return self._launched_if_any(batch)

    def commit(self, batch: Batch, token_ids: list[int]) -> Outcome:
        """The real one's, but of decodes only those are told that end."""
        if not isinstance(batch, BulkBatch):
            outcome = super().commit(batch, token_ids)
            self._begin_bulk()
            return outcome
        ends = sorted(batch.ends, key=BY_ARRIVAL)
        for sequence in ends:
            self._forget(sequence)
            self._running.remove(sequence)
            self._free(sequence)
        outcome = super().commit(batch, token_ids)
        outcome.request_ids[:0] = [sequence.request_id for sequence in ends]
        outcome.finish[:0] = [LENGTH] * len(ends)
        return outcome

    def commit_quietly(self, batch: Batch | None) -> None:
        """The same of one in which nothing happens."""
        assert self._launched.popleft() is batch, "batches end in the order of their launches"

    def num_tokens(self, sequence: Sequence) -> int:
        """That it has by now."""
        known = len(sequence.token_ids)
        if not self._in_bulk or sequence.stage is not Stage.RUNNING:
            return known
        num_ended = self._number - any(batch.num_decodes for batch in self._launched)
        began: int = sequence.device_state
        return known + max(0, num_ended - began)

    def _with_decodes(self) -> Batch:
        """A batch with all that decode."""
        number, num_decodes = self._number, len(self._running)
        growing = self._growing.pop(number, ())
        if len(growing) > self.blocks.num_free:
            self._end_bulk()
            batch = Batch()
            self._plan_decodes(batch, num_decodes)
            return batch
        if growing:
            self._grow_all(growing)
        if not num_decodes:
            return BulkBatch()
        self._number += 1
        kv_tokens = self._sum + num_decodes * number
        ends = self._ending.pop(number, [])
        return BulkBatch(num_decodes=num_decodes, kv_tokens=kv_tokens, ends=ends)

    def _grow_all(self, growing: list[Sequence]) -> None:
        """A block more for each, which lasts for so many passes as it has tokens."""
        block_ids = self.blocks.allocate(len(growing))
        for sequence, block_id in zip(growing, block_ids, strict=True):
            sequence.block_ids.append(block_id)
        self._growing[self._number + self.limits.block_size] += growing

    def _launched_if_any(self, batch: Batch) -> Batch | None:
        if batch.work or batch.num_decodes:
            self._launch(batch)
            return batch
        assert not batch.preempted, "preempted for nobody's benefit"
        if not isinstance(batch, BulkBatch):
            self._begin_bulk()
        return None

    # ---- in bulk, and out of it

    def _run(self, sequence: Sequence) -> None:
        super()._run(sequence)
        if self._in_bulk:
            self._note(sequence)

    def _note(self, sequence: Sequence) -> None:
        """It decodes from the next pass on."""
        number = sequence.device_state = self._number
        num_tokens = len(sequence.token_ids)
        self._sum += num_tokens - number
        self._growing[self._grows(sequence)].append(sequence)
        self._ending[number + sequence.max_len - num_tokens - 1].append(sequence)

    def _forget(self, sequence: Sequence) -> None:
        """It ends."""
        self._sum -= len(sequence.token_ids) - sequence.device_state
        self._growing[self._grows(sequence)].remove(sequence)

    def _grows(self, sequence: Sequence) -> int:
        """The number of the pass that needs one more block."""
        has_tokens = len(sequence.block_ids) * self.limits.block_size
        number: int = sequence.device_state
        return number + has_tokens - sequence.num_computed

    def _end_bulk(self) -> None:
        """Every sequence gets the tokens of the passes that it was in."""
        for sequence in self._running:
            num_passes = self._number - sequence.device_state
            sequence.token_ids.frombytes(bytes(num_passes * sequence.token_ids.itemsize))
            sequence.num_computed += num_passes
        self._growing.clear()
        self._ending.clear()
        self._sum = 0
        self._in_bulk = False

    def _begin_bulk(self) -> None:
        self._in_bulk = True
        for sequence in self._running:
            self._note(sequence)


class PrefillFirst(BulkScheduler):
    """Steps as vLLM 0.2 composed them, to compare with: prompts before anybody decodes, and never
    both in one step. Ours would never do so, hence it is no option of the engine."""

    def next_batch(self, ahead: bool = False, idle: bool = False) -> Batch | None:
        assert not (ahead or idle or self._launched), "one batch at a time"
        batch: Batch = BulkBatch()
        self._plan_prefills(batch, len(self._running))
        if not batch.work:
            batch = self._with_decodes()
        return self._launched_if_any(batch)
