"""Which tokens of which sequences one step computes: continuous batching with chunked prefill.

A batch counts as launched when `next_batch` returns it: what it will compute is booked then, and
`commit` books the tokens that came of it. More may be planned before that (`ahead`), so that they
are launched while the first still runs: one behind it, or on a device of several stages one beside
each other for every stage. Batches are committed in their order.

Always true (`check` says so):
- A sequence is in exactly one stage, and every used block belongs to exactly one sequence.
- Blocks stay with a sequence that is gone until no launched step may write to them: its last ones
  are freed when the last launched step that has it is committed.
- A prefill takes the blocks of all its tokens when its first chunk is planned, or none: two
  half-computed prompts can never wait for each other's blocks. Chunks are given out first come,
  first served: in `waiting` the wholly launched ones come first, and of the others only the first
  may hold blocks.
- `running` is sorted by arrival, so the last one is the cheapest to give up.

Planning ahead or beside knows less, so it does less (policy/decode_plans.py): it never preempts.

Nothing here knows whether its worker prefills or decodes: a prefill worker's requests ask for a
handoff and end up pinned, a decode worker's arrive by a pull, a mixed one's do neither.

A request that could not fit the empty pool is refused when it arrives. So a sequence that finds no
free block either has a younger neighbour to preempt, or waits for pages that a peer will release.
"""

from array import array
from bisect import insort
from collections import Counter, deque
from operator import attrgetter

from nodeserve.policy.batching import Batch, Limits, Outcome, Sequence, Stage, Work
from nodeserve.policy.blocks import BlockAllocator, blocks_for, watermark
from nodeserve.policy.chunks import chunk_cost, longest_chunk
from nodeserve.policy.decode_plans import decodes_ahead, decodes_beside, share

BY_ARRIVAL = attrgetter("arrival")


class Scheduler:
    """Owns the blocks and the stages of all sequences of one worker."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.blocks = BlockAllocator(limits.num_blocks)
        self._sequences: dict[int, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._launched: deque[Batch] = deque()  # planned and not committed, at most two
        self._leaving: set[Sequence] = set()  # gone, but a launched step may write to its blocks
        self._num_pulling = 0
        self._num_pinned = 0
        self._waiting_tokens = 0
        self._spoken_for = 0  # blocks that waiting sequences will take
        self._arrivals = 0

    # ---- requests come and go

    def submit(self, sequence: Sequence) -> None:
        """Queue a prefill. PromptTooLong or OutOfBlocks if it could never run here."""
        self._admit(sequence)
        sequence.stage = Stage.WAITING
        self._waiting.append(sequence)
        self._waiting_tokens += len(sequence.token_ids)
        self._spoken_for += self._prompt_blocks(sequence)

    def begin_pull(self, sequence: Sequence) -> bool:
        """Reserve blocks for a request prefilled elsewhere; False and nothing taken if no room."""
        needed = self._prompt_blocks(sequence)
        self.limits.check_fits(sequence)
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

    def next_batch(self, ahead: bool = False, idle: bool = False) -> Batch | None:
        """Decodes first, then prefill chunks up to the token budget; None if nothing can run, or
        an empty batch with `idle`: other ranks wait for this one.

        `ahead`: behind the one batch that is not committed, or beside the fewer than `num_stages`
        that are not; None, and nothing changed, also if one has to be committed first.
        """
        num_launched, num_stages = len(self._launched), self.limits.num_stages
        may = num_launched < max(num_stages, 2) and bool(num_launched) == ahead
        assert may, "one batch at a time, and one ahead of it, or one for each stage"
        batch = Batch()
        if not ahead:
            self._plan_decodes(batch, share(len(self._running), num_stages))
            self._plan_prefills(batch, len(self._running))
        elif (decodes := self._decodes_meanwhile()) is not None:
            batch.work, batch.num_decodes = decodes, len(decodes)
            self._plan_prefills(batch, len(self._running) if num_stages > 1 else len(decodes))
        assert batch.work or not batch.preempted, "preempted for nobody's benefit"
        if not (batch.work or idle):
            return None
        self._launch(batch)
        return batch

    def commit(self, batch: Batch, token_ids: list[int]) -> Outcome:
        """Book the tokens of `batch.sampled`, in that order; of sequences gone they are dropped."""
        assert self._launched.popleft() is batch, "batches end in the order of their launches"
        outcome = Outcome([], [], [], [], [])
        request_ids, kept_ids, finishes, _, kept = outcome
        gone, waiting = Stage.GONE, Stage.WAITING
        place = -1
        any_decode_ended = False
        for sequence, _, _, samples, _ in batch.work:
            sequence.num_launched -= 1
            place += samples
            if sequence.stage is gone:
                self._free_if_over(sequence)
            elif samples:
                token_id = token_ids[place]
                finish = sequence.append(token_id)
                request_ids.append(sequence.request_id)
                kept_ids.append(token_id)
                finishes.append(finish)
                kept.append(place)
                if sequence.stage is waiting:
                    self._leave_prefill(sequence, finish, outcome)
                elif finish:
                    any_decode_ended = True
                    self._free(sequence)
        if any_decode_ended:
            self._running = [one for one in self._running if one.stage is Stage.RUNNING]
        return outcome

    @property
    def has_prompts(self) -> bool:
        """Whether some prompt is not computed whole."""
        return bool(self._waiting)

    def load(self) -> list[int]:
        """The fields of types.Load but the last."""
        return [
            len(self._running) + self._num_pulling,
            len(self._waiting),
            self._num_pinned,
            self.blocks.num_free - self._spoken_for,
            self._waiting_tokens + sum([batch.num_prefill_tokens for batch in self._launched]),
        ]

    # ---- planning

    def _decodes_meanwhile(self) -> list[Work] | None:
        """Of a batch beside others, or behind one; None if that has to be committed first."""
        known = self._running, self.blocks, self.limits.block_size
        if self.limits.num_stages > 1:
            return decodes_beside(*known, self.limits.num_stages)
        return decodes_ahead(*known, self._launched[0])

    def _plan_decodes(self, batch: Batch, most: int) -> None:
        block_size, work, running = self.limits.block_size, batch.work, Stage.RUNNING
        for sequence in tuple(self._running):
            if len(work) == most:
                break
            if sequence.stage is not running:
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
            youngest = max(youngest, self._waiting[0], key=BY_ARRIVAL)
        return youngest

    def _has_elder(self, sequence: Sequence) -> bool:
        head = self._waiting[0] if self._waiting else None
        return self._running[0] is not sequence or bool(head and head.block_ids)

    def _plan_prefills(self, batch: Batch, num_decoding: int) -> None:
        limits, work = self.limits, batch.work
        num_seqs = batch.num_decodes
        budget, weight = limits.max_num_batched_tokens - num_seqs, limits.attention_weight
        cost = chunk_cost(limits.max_num_batched_tokens, 0, weight) - num_seqs
        num_slots = limits.max_num_seqs - num_decoding - self._num_pulling
        for sequence in self._waiting:
            if budget <= 0 or num_seqs >= limits.max_num_seqs:
                break
            if not sequence.handoff:
                if num_slots < 1:
                    break
                num_slots -= 1
            missing = len(sequence.token_ids) - sequence.num_computed
            if not missing:
                continue  # the last of it is at another stage
            context = sequence.num_computed
            least = not batch.num_prefill_tokens  # however much a token costs, prompts get on
            count = min(budget, missing, max(longest_chunk(cost, context, weight), least))
            if not count or not (sequence.block_ids or self._start(sequence, batch)):
                break
            work.append(Work(sequence, context, count, count == missing))
            batch.num_prefill_tokens += count
            if count < missing:
                break  # what is left of the cost may be enough for a token of a younger prompt
            budget -= count
            cost -= chunk_cost(count, context, weight)
            num_seqs += 1

    def _start(self, sequence: Sequence, batch: Batch) -> bool:
        needed = self._prompt_blocks(sequence)
        if needed + self._watermark() > self.blocks.num_free:
            return False
        sequence.block_ids.extend(self.blocks.allocate(needed))
        self._spoken_for -= needed
        batch.started.append(sequence)
        return True

    def _prompt_blocks(self, sequence: Sequence) -> int:
        return blocks_for(len(sequence.token_ids), self.limits.block_size)

    def _launch(self, batch: Batch) -> None:
        place = 0
        for sequence, _, count, samples, _ in batch.work:
            sequence.num_computed += count
            sequence.num_launched += 1
            if samples:
                sequence.place = place
                place += 1
        self._waiting_tokens -= batch.num_prefill_tokens
        self._launched.append(batch)

    def _watermark(self) -> int:
        """Blocks that newcomers leave to sequences that already decode, or will after this step."""
        head = self._waiting[0] if self._waiting else None
        joins = bool(head and not head.handoff and head.num_computed == len(head.token_ids))
        grows = joins or bool(self._running or self._num_pulling)
        return watermark(self.limits.num_blocks) if grows else 0

    def _num_free_slots(self) -> int:
        """Sequences that may still come to decode here."""
        taken = len(self._running) + self._num_pulling
        for sequence in self._waiting:
            if not sequence.block_ids:
                break
            taken += not sequence.handoff
        return self.limits.max_num_seqs - taken

    # ---- stages

    def _admit(self, sequence: Sequence) -> None:
        self.limits.check_fits(sequence)
        assert sequence.request_id not in self._sequences, sequence.request_id
        sampling = sequence.sampling
        eos = frozenset() if sampling.ignore_eos else self.limits.eos_token_ids
        sequence.stop_ids = eos.union(sampling.stop_token_ids)
        sequence.max_len = self.limits.max_len(sequence)
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self._sequences[sequence.request_id] = sequence

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
        insort(self._running, sequence, key=BY_ARRIVAL)

    def _drop(self, sequence: Sequence) -> None:
        match sequence.stage:
            case Stage.WAITING:
                self._waiting.remove(sequence)
                self._waiting_tokens -= len(sequence.token_ids) - sequence.num_computed
                if not sequence.block_ids:
                    self._spoken_for -= self._prompt_blocks(sequence)
            case Stage.RUNNING:
                self._running.remove(sequence)
            case Stage.PULLING:
                self._num_pulling -= 1
            case Stage.PINNED:
                self._num_pinned -= 1
        self._free(sequence)

    def _free(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        sequence.stage = Stage.GONE
        self._leaving.add(sequence)
        self._free_if_over(sequence)

    def _free_if_over(self, sequence: Sequence) -> None:
        """Give a gone sequence's blocks back, unless a launched step may still write to them."""
        if not sequence.num_launched:
            self._leaving.remove(sequence)
            self.blocks.release(sequence.block_ids.tolist())

    def held(self) -> list[Sequence]:
        """All that are here, and those gone whose blocks a launched step may still write to."""
        return [*self._sequences.values(), *self._leaving]

    def check(self) -> None:
        """Audit: nothing lost, nothing twice. Cheap enough to run when idle."""
        self.blocks.check()
        here = list(self._sequences.values())
        held = [block for one in self.held() for block in one.block_ids]
        assert len(held) == len(set(held)) == self.limits.num_blocks - self.blocks.num_free
        stages = [one.stage for one in here]
        assert stages.count(Stage.WAITING) == len(self._waiting)
        assert stages.count(Stage.RUNNING) == len(self._running) <= self.limits.max_num_seqs
        assert stages.count(Stage.PULLING) == self._num_pulling
        assert stages.count(Stage.PINNED) == self._num_pinned
        assert len(self._sequences) == len(self._waiting) + len(self._running) + (
            self._num_pulling + self._num_pinned
        )
        assert [one.arrival for one in self._running] == sorted(map(BY_ARRIVAL, self._running))
        missing = [len(one.token_ids) - one.num_computed for one in self._waiting]
        assert self._waiting_tokens == sum(missing)
        assert missing == sorted(missing, key=bool), "wholly launched ones come first"
        unfinished = [one for one in self._waiting if one.num_computed < len(one.token_ids)]
        assert not any(one.block_ids for one in unfinished[1:])
        self._check_launched(here)

    def _check_launched(self, here: list[Sequence]) -> None:
        assert len(self._launched) <= max(self.limits.num_stages, 2)
        times = Counter(work.sequence for batch in self._launched for work in batch.work)
        assert all(one.num_launched == times[one] for one in (*here, *self._leaving))
        assert set(times) <= {*here, *self._leaving}
        for one in self._leaving:
            assert one.stage is Stage.GONE and one.num_launched
        for one in self._running:
            assert one.num_computed - one.num_launched == len(one.token_ids) - 1
