"""The scheduler of a simulated rank: the decisions of the real one, with its decodes in bulk.

Where nobody looks at tokens, every sequence that decodes gets one a pass, and what can happen to it
is known when it begins: at which pass it needs its next block, and at which it ends. So a pass
touches only those to whom something happens, and its work is a sum that is kept. What a shortage
of blocks asks for is not foreseeable: then all sequences are brought up to date, and the real
scheduler plans that pass.
"""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from operator import attrgetter

from nodeserve.policy.batching import LENGTH, Batch, Limits, Outcome, Sequence, Stage, Work
from nodeserve.policy.cost import RankWork, prefill_pairs, rank_work
from nodeserve.policy.decode_plans import share
from nodeserve.policy.scheduler import BY_ARRIVAL, Scheduler


@dataclass(slots=True)
class BulkBatch(Batch):
    """`work` has prompts only; `num_decodes` more sequences get a token, and `ends` their last."""

    kv_tokens: int = 0
    lane: "Lane | None" = None  # of its decodes; None: it has none
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


class Lane:
    """Sequences whose decodes are in the same passes. Where passes are in several stages at once,
    there is one for each of these. Of a sequence `device_state` is its lane, and the number of the
    first of its passes that the sequence is in."""

    def __init__(self, block_size: int) -> None:
        self.number = 0  # of the next pass
        self.num_decodes = 0
        self.under_way = False
        self.growing: dict[int, list[Sequence]] = defaultdict(list)  # by number of a pass
        self.ending: dict[int, list[Sequence]] = defaultdict(list)
        self._block_size = block_size
        self._sum = 0  # context tokens of all, in a pass with number 0

    @property
    def kv_tokens(self) -> int:
        """Context of all in the next pass."""
        return self._sum + self.num_decodes * self.number

    def add(self, sequence: Sequence) -> None:
        """It decodes from the next pass on."""
        number, num_tokens = self.number, len(sequence.token_ids)
        sequence.device_state = self, number
        self.num_decodes += 1
        self._sum += num_tokens - number
        self.growing[self._grows(sequence)].append(sequence)
        self.ending[number + sequence.max_len - num_tokens - 1].append(sequence)

    def forget(self, sequence: Sequence) -> None:
        """It ends."""
        self.num_decodes -= 1
        self._sum -= len(sequence.token_ids) - sequence.device_state[1]
        self.growing[self._grows(sequence)].remove(sequence)

    def clear(self) -> None:
        self.growing.clear()
        self.ending.clear()
        self._sum = self.num_decodes = 0

    def _grows(self, sequence: Sequence) -> int:
        """The number of the pass that needs one more block."""
        has_tokens = len(sequence.block_ids) * self._block_size
        began: int = sequence.device_state[1]
        return began + has_tokens - sequence.num_computed


class BulkScheduler(Scheduler):
    """Sequences that decode are as they were when they began, until they end or all are brought up
    to date. With stages they are dealt out to lanes when they begin, not anew for each pass."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self._in_bulk = True
        # Whose turn it is comes first.
        self._lanes = [Lane(limits.block_size) for _ in range(limits.num_stages)]

    def next_batch(self, ahead: bool = False, idle: bool = False) -> Batch | None:
        """As the real one's; a simulated rank is never called by others, and plans ahead only
        beside the passes in other stages."""
        if not self._may_plan(ahead, idle):
            return None
        batch = self._with_decodes()
        if batch is None:
            return None
        if self._waiting:
            self._plan_prefills(batch, len(self._running))
        return self._launched_if_any(batch)

    @property
    def has_idle_work(self) -> bool:
        """Whether a batch beside those under way may have something in it."""
        return self.has_prompts or any(
            lane.num_decodes and not lane.under_way for lane in self._lanes
        )

    def commit(self, batch: Batch, token_ids: list[int]) -> Outcome:
        """The real one's, but of decodes only those are told that end."""
        if not isinstance(batch, BulkBatch):
            outcome = super().commit(batch, token_ids)
            self._begin_bulk()
            return outcome
        ends = sorted(batch.ends, key=BY_ARRIVAL)
        for sequence in ends:
            sequence.device_state[0].forget(sequence)
            self._running.remove(sequence)
            self._free(sequence)
        if batch.lane is not None:
            batch.lane.under_way = False
        outcome = super().commit(batch, token_ids)
        outcome.request_ids[:0] = [sequence.request_id for sequence in ends]
        outcome.finish[:0] = [LENGTH] * len(ends)
        return outcome

    def commit_quietly(self, batch: Batch | None) -> None:
        """The same of one in which nothing happens."""
        assert self._launched.popleft() is batch, "batches end in the order of their launches"
        assert isinstance(batch, BulkBatch) and batch.lane is not None, "nothing but decodes"
        batch.lane.under_way = False

    def num_tokens(self, sequence: Sequence) -> int:
        """That it has by now."""
        known = len(sequence.token_ids)
        if not self._in_bulk or sequence.stage is not Stage.RUNNING:
            return known
        lane, began = sequence.device_state
        num_passes: int = lane.number - lane.under_way - began
        return known + max(0, num_passes)

    def _may_plan(self, ahead: bool, idle: bool) -> bool:
        launched = self._launched
        may = not idle and len(launched) < self.limits.num_stages and ahead == bool(launched)
        assert may, "one batch at a time, or one for each stage"
        return self._in_bulk or not launched  # what the real scheduler plans, it plans alone

    def _with_decodes(self) -> Batch | None:
        """A batch with the decodes of the lane whose turn it is; None if one has to be committed
        first."""
        lane = self._next_lane()
        if lane is None:
            return BulkBatch()
        number = lane.number
        growing = lane.growing.pop(number, ())
        if len(growing) > self.blocks.num_free:
            if self._launched:
                lane.growing[number] += growing
                return None
            self._end_bulk()
            batch = Batch()
            self._plan_decodes(batch, share(len(self._running), len(self._lanes)))
            return batch
        if growing:
            self._grow_all(growing)
            lane.growing[number + self.limits.block_size] += growing
        batch = BulkBatch(num_decodes=lane.num_decodes, kv_tokens=lane.kv_tokens, lane=lane)
        batch.ends = lane.ending.pop(number, [])
        lane.number += 1
        lane.under_way = True
        return batch

    def _grow_all(self, growing: Collection[Sequence]) -> None:
        """A block more for each, which lasts for so many passes as it has tokens."""
        for sequence, block_id in zip(growing, self.blocks.allocate(len(growing)), strict=True):
            sequence.block_ids.append(block_id)

    def _next_lane(self) -> Lane | None:
        """One that is not under way and has decodes; the others are before it next time."""
        for place, lane in enumerate(self._lanes):
            if lane.num_decodes and not lane.under_way:
                self._lanes.append(self._lanes.pop(place))
                return lane
        return None

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
            self._deal(sequence)

    def _deal(self, sequence: Sequence) -> None:
        lanes = self._lanes
        fewest = lanes[0] if len(lanes) == 1 else min(lanes, key=_num_decodes)
        fewest.add(sequence)

    def _end_bulk(self) -> None:
        """Every sequence gets the tokens of the passes that it was in."""
        for sequence in self._running:
            lane, began = sequence.device_state
            num_passes = lane.number - began
            sequence.token_ids.frombytes(bytes(num_passes * sequence.token_ids.itemsize))
            sequence.num_computed += num_passes
        for lane in self._lanes:
            lane.clear()
        self._in_bulk = False

    def _begin_bulk(self) -> None:
        self._in_bulk = True
        for sequence in self._running:
            self._deal(sequence)


_num_decodes = attrgetter("num_decodes")


class PrefillFirst(BulkScheduler):
    """Steps as vLLM 0.2 composed them, to compare with: prompts before anybody decodes, and never
    both in one step. Ours would never do so, hence it is no option of the engine."""

    def next_batch(self, ahead: bool = False, idle: bool = False) -> Batch | None:
        if not self._may_plan(ahead, idle):
            return None
        batch: Batch | None = BulkBatch()
        assert batch is not None
        self._plan_prefills(batch, len(self._running))
        if not batch.work:
            batch = self._with_decodes()
        return self._launched_if_any(batch) if batch else None
