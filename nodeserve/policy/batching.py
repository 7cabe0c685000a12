"""Which tokens of which sequences one step computes: continuous batching with chunked prefill.

Always true, except between a batch's planning and its commit (`check` says so):
- A sequence is in exactly one stage, and every used block belongs to exactly one sequence.
- A prefill takes the blocks of all its tokens when its first chunk is planned, or none: two
  half-computed prompts can never wait for each other's blocks. Only the head of `waiting` may hold
  blocks, since chunks are given out first come, first served.
- `running` is sorted by arrival, so the last one is the cheapest to give up.

Nothing here knows whether its worker prefills or decodes: a prefill worker's requests ask for a
handoff and end up pinned, a decode worker's arrive by a pull, a mixed one's do neither.

A request that could not fit the empty pool is refused when it arrives. So a sequence that finds no
free block either has a younger neighbour to preempt, or waits for pages that a peer will release.
"""

import enum
from array import array
from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

from nodeserve.errors import ConfigError, OutOfBlocks, PromptTooLong
from nodeserve.policy.blocks import BlockAllocator, blocks_for
from nodeserve.types import Sampling

GOES_ON, STOP, LENGTH = range(3)  # places in wire.messages.FINISH_REASONS


class Stage(enum.Enum):
    NEW = enum.auto()  # not taken yet
    WAITING = enum.auto()  # prefill not finished
    RUNNING = enum.auto()  # one token a step
    PULLING = enum.auto()  # its pages are on their way here
    PINNED = enum.auto()  # prefilled, its pages wait for a peer
    GONE = enum.auto()  # finished, preempted, released or cancelled: holds nothing


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on this worker. `token_ids` grows; the KV of the first `num_computed` exists."""

    request_id: int
    token_ids: "array[int]"
    num_prompt_tokens: int
    sampling: Sampling
    handoff: bool = False
    num_computed: int = 0
    block_ids: "array[int]" = field(default_factory=lambda: array("i"))
    stage: Stage = Stage.NEW
    arrival: int = -1
    stop_ids: frozenset[int] = frozenset()
    max_len: int = 0  # tokens, prompt and output, at which the request ends
    device_state: Any = None  # the executor's own notes; they go when the sequence goes

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


class Work(NamedTuple):
    """`num_tokens` of a sequence from `start` on; `samples` if its last one is among them."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    feed: int | None = None

    @property
    def num_output(self) -> int:
        """Output tokens before the one that this work samples, whether read yet or not."""
        return self.start + self.num_tokens - self.sequence.num_prompt_tokens


@dataclass(slots=True)
class Batch:
    """One step's work, decodes first, and what planning it did to other requests."""

    work: list[Work] = field(default_factory=list)
    num_decodes: int = 0
    num_prefill_tokens: int = 0
    started: list[int] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)

    @property
    def sampled(self) -> list[Sequence]:
        """Sequences that get a token, in the order in which `commit` takes the tokens."""
        return [work.sequence for work in self.work if work.samples]


class Outcome(NamedTuple):
    """What one step did, ready to be told."""

    request_ids: list[int]
    token_ids: list[int]
    finish: list[int]
    kv_ready: list[tuple[int, "array[int]"]]


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds one worker."""

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    eos_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max-num-batched-tokens ({self.max_num_batched_tokens}) must be at least"
                f" max-num-seqs ({self.max_num_seqs}): every running request takes one token a step"
            )


_BY_ARRIVAL = attrgetter("arrival")


class Scheduler:
    """Owns the blocks and the stages of all sequences of one worker."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.blocks = BlockAllocator(limits.num_blocks)
        self._sequences: dict[int, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._num_pulling = 0
        self._num_pinned = 0
        self._waiting_tokens = 0
        self._arrivals = 0

    # ---- requests come and go

    def submit(self, sequence: Sequence) -> None:
        """Queue a prefill. PromptTooLong or OutOfBlocks if it could never run here."""
        self._admit(sequence)
        sequence.stage = Stage.WAITING
        self._waiting.append(sequence)
        self._waiting_tokens += len(sequence.token_ids)

    def begin_pull(self, sequence: Sequence) -> bool:
        """Reserve blocks for a request prefilled elsewhere; False and nothing taken if no room."""
        needed = blocks_for(len(sequence.token_ids), self.limits.block_size)
        self._check_fits(sequence)
        if self._num_free_slots() < 1 or needed + self._watermark() > self.blocks.num_free:
            return False
        self._admit(sequence)
        sequence.block_ids.extend(self.blocks.allocate(needed))
        sequence.num_computed = len(sequence.token_ids) - 1
        sequence.stage = Stage.PULLING
        self._num_pulling += 1
        return True

    def computed_blocks(self, sequence: Sequence) -> "array[int]":
        """The blocks that hold KV, or will when a pull ends."""
        return sequence.block_ids[: blocks_for(sequence.num_computed, self.limits.block_size)]

    def finish_pull(self, request_id: int) -> None:
        """The pages are here: decode from the next step on."""
        sequence = self._sequences[request_id]
        assert sequence.stage is Stage.PULLING, sequence.stage
        self._num_pulling -= 1
        self._run(sequence)

    def release(self, request_id: int) -> None:
        """A peer has the pages of a pinned request; nothing happens if a cancel came first."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            assert sequence.stage is Stage.PINNED, sequence.stage
            self._drop(sequence)

    def cancel(self, request_id: int) -> None:
        """Forget a request in any stage, or an unknown one."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._drop(sequence)

    def clear(self) -> list[int]:
        """Forget every request; their ids."""
        held = list(self._sequences)
        for request_id in held:
            self.cancel(request_id)
        return held

    # ---- a step

    def next_batch(self) -> Batch | None:
        """Decodes first, then prefill chunks up to the token budget; None if nothing can run."""
        batch = Batch()
        self._plan_decodes(batch)
        self._plan_prefills(batch)
        assert batch.work or not batch.preempted, "preempted for nobody's benefit"
        return batch if batch.work else None

    def commit(self, batch: Batch, token_ids: list[int]) -> Outcome:
        """Book a computed batch and the tokens of `batch.sampled`, in that order."""
        outcome = Outcome([], token_ids, [], [])
        tokens = iter(token_ids)
        any_decode_ended = False
        for sequence, _, count, samples, _ in batch.work:
            sequence.num_computed += count
            if sequence.stage is Stage.WAITING:
                self._waiting_tokens -= count
            if not samples:
                continue
            token_id = next(tokens)
            finish = self._append(sequence, token_id)
            outcome.request_ids.append(sequence.request_id)
            outcome.finish.append(finish)
            if sequence.stage is Stage.WAITING:
                self._leave_prefill(sequence, finish, outcome)
            elif finish:
                any_decode_ended = True
                self._free(sequence)
        if any_decode_ended:
            self._running = [one for one in self._running if one.stage is Stage.RUNNING]
        return outcome

    def load(self) -> list[int]:
        """The fields of wire.messages.Load."""
        return [
            len(self._running),
            len(self._waiting),
            self._num_pinned,
            self.blocks.num_free,
            self._waiting_tokens,
        ]

    # ---- planning

    def _plan_decodes(self, batch: Batch) -> None:
        block_size, work = self.limits.block_size, batch.work
        for sequence in tuple(self._running):
            if sequence.stage is not Stage.RUNNING:
                continue  # an elder took its blocks
            computed = sequence.num_computed
            if computed == len(sequence.block_ids) * block_size and not self._grow(sequence, batch):
                continue
            work.append(Work(sequence, computed, 1, True))
        batch.num_decodes = len(work)

    def _grow(self, sequence: Sequence, batch: Batch) -> bool:
        """One more block, if need be from the youngest; False if the sequence cannot go on now."""
        while not self.blocks.num_free:
            victim = self._youngest_holder()
            if victim is sequence and not self._has_elder(sequence):
                return False  # the other blocks are pinned or being filled: they will come back
            batch.preempted.append(victim.request_id)
            self._drop(victim)
            if victim is sequence:
                return False
        sequence.block_ids.extend(self.blocks.allocate(1))
        return True

    def _youngest_holder(self) -> Sequence:
        youngest = self._running[-1]
        if self._waiting and self._waiting[0].block_ids:
            youngest = max(youngest, self._waiting[0], key=_BY_ARRIVAL)
        return youngest

    def _has_elder(self, sequence: Sequence) -> bool:
        head = self._waiting[0] if self._waiting else None
        return self._running[0] is not sequence or bool(head and head.block_ids)

    def _plan_prefills(self, batch: Batch) -> None:
        limits, work = self.limits, batch.work
        budget = limits.max_num_batched_tokens - len(work)
        num_slots = self._num_free_slots(but_prefills=True)
        for sequence in self._waiting:
            if budget <= 0 or len(work) >= limits.max_num_seqs:
                break
            if not sequence.handoff:
                if num_slots < 1:
                    break
                num_slots -= 1
            if not sequence.block_ids and not self._start(sequence, batch):
                break
            missing = len(sequence.token_ids) - sequence.num_computed
            count = min(budget, missing)
            work.append(Work(sequence, sequence.num_computed, count, count == missing))
            batch.num_prefill_tokens += count
            budget -= count

    def _start(self, sequence: Sequence, batch: Batch) -> bool:
        needed = blocks_for(len(sequence.token_ids), self.limits.block_size)
        if needed + self._watermark() > self.blocks.num_free:
            return False
        sequence.block_ids.extend(self.blocks.allocate(needed))
        batch.started.append(sequence.request_id)
        return True

    def _watermark(self) -> int:
        """Blocks that newcomers leave to sequences that already decode."""
        grows = bool(self._running or self._num_pulling)
        return max(1, self.limits.num_blocks // 100) if grows else 0

    def _num_free_slots(self, but_prefills: bool = False) -> int:
        """Sequences that may still come to decode here."""
        taken = len(self._running) + self._num_pulling
        head = self._waiting[0] if self._waiting and not but_prefills else None
        started = bool(head and head.block_ids and not head.handoff)
        return self.limits.max_num_seqs - taken - started

    # ---- stages

    def _check_fits(self, sequence: Sequence) -> None:
        limits = self.limits
        longest = len(sequence.token_ids) + 1
        if not sequence.handoff:
            longest = self._max_len(sequence)
        if len(sequence.token_ids) >= limits.max_model_len:
            raise PromptTooLong(
                f"{len(sequence.token_ids)} tokens leave no room for a new one in a context of"
                f" {limits.max_model_len}"
            )
        # Its last token's KV is never written.
        if (needed := blocks_for(longest - 1, limits.block_size)) > limits.num_blocks:
            raise OutOfBlocks(
                f"{longest} tokens need {needed} KV blocks, the whole pool has"
                f" {limits.num_blocks}: give more --kv-memory or a smaller max_tokens"
            )

    def _max_len(self, sequence: Sequence) -> int:
        return min(
            sequence.num_prompt_tokens + sequence.sampling.max_tokens, self.limits.max_model_len
        )

    def _admit(self, sequence: Sequence) -> None:
        self._check_fits(sequence)
        assert sequence.request_id not in self._sequences, sequence.request_id
        sampling = sequence.sampling
        eos = frozenset() if sampling.ignore_eos else self.limits.eos_token_ids
        sequence.stop_ids = eos.union(sampling.stop_token_ids)
        sequence.max_len = self._max_len(sequence)
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self._sequences[sequence.request_id] = sequence

    @staticmethod
    def _append(sequence: Sequence, token_id: int) -> int:
        tokens = sequence.token_ids
        place = len(tokens) - sequence.num_prompt_tokens
        tokens.append(token_id)
        if token_id in sequence.stop_ids and place >= sequence.sampling.min_tokens:
            return STOP
        return LENGTH if len(tokens) >= sequence.max_len else GOES_ON

    def _leave_prefill(self, sequence: Sequence, finish: int, outcome: Outcome) -> None:
        assert self._waiting[0] is sequence, "prefills end in their order of arrival"
        self._waiting.popleft()
        if finish:
            self._free(sequence)
        elif sequence.handoff:
            sequence.stage = Stage.PINNED
            self._num_pinned += 1
            outcome.kv_ready.append((sequence.request_id, sequence.block_ids))
        else:
            self._run(sequence)

    def _run(self, sequence: Sequence) -> None:
        sequence.stage = Stage.RUNNING
        insort(self._running, sequence, key=_BY_ARRIVAL)

    def _drop(self, sequence: Sequence) -> None:
        match sequence.stage:
            case Stage.WAITING:
                self._waiting.remove(sequence)
                self._waiting_tokens -= len(sequence.token_ids) - sequence.num_computed
            case Stage.RUNNING:
                self._running.remove(sequence)
            case Stage.PULLING:
                self._num_pulling -= 1
            case Stage.PINNED:
                self._num_pinned -= 1
        self._free(sequence)

    def _free(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_ids.tolist())
        del self._sequences[sequence.request_id]
        sequence.stage = Stage.GONE

    def check(self) -> None:
        """Audit: nothing lost, nothing twice. Cheap enough to run when idle."""
        self.blocks.check()
        held = [block for one in self._sequences.values() for block in one.block_ids]
        assert len(held) == len(set(held)) == self.limits.num_blocks - self.blocks.num_free
        stages = [one.stage for one in self._sequences.values()]
        assert stages.count(Stage.WAITING) == len(self._waiting)
        assert stages.count(Stage.RUNNING) == len(self._running) <= self.limits.max_num_seqs
        assert stages.count(Stage.PULLING) == self._num_pulling
        assert stages.count(Stage.PINNED) == self._num_pinned
        assert len(self._sequences) == len(self._waiting) + len(self._running) + (
            self._num_pulling + self._num_pinned
        )
        assert [one.arrival for one in self._running] == sorted(map(_BY_ARRIVAL, self._running))
        assert not any(one.block_ids for one in list(self._waiting)[1:])
        missing = (len(one.token_ids) - one.num_computed for one in self._waiting)
        assert self._waiting_tokens == sum(missing)
