"""Launches steps on a GPU and leaves them there: nothing in `launch` waits for the device.

A step is one copy of inputs, the forward pass, the choice of tokens, and their copy to pinned
memory. Steps of decodes alone replay a captured graph of the next larger size. The tokens chosen
stay on the device as well, where the step behind takes its inputs from (`Work.feed`), so it may be
launched before anybody has read them.

With several stages a step is submitted in two pieces: our stage's layers, and the choice of tokens
when the last stage has passed. Between the two other sequences' steps may be submitted. A choice
that was submitted earlier would wait for its rows on the device, and all that is behind it as well.
"""

import gc
import itertools
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nodeserve.log import logger
from nodeserve.model.gpu.attention.tiles import seq_bucket
from nodeserve.model.inputs import StepInputs
from nodeserve.policy.batching import Batch, Sequence, Work
from nodeserve.policy.blocks import blocks_for
from nodeserve.policy.cost import rank_work
from nodeserve.types import Sampling
from nodeserve.worker.contract import ALONE, Agree, Flight, Passing, Sampled, Team
from nodeserve.worker.gpu_runtime import Mark, Runtime
from nodeserve.worker.ranks import NO_RANKS, Began, Ranks
from nodeserve.worker.sizing import bucket_for
from nodeserve.worker.staging_cuda import CudaStaging, Staged
from nodeserve.worker.watcher import Watcher


class Model(Protocol):
    """A decoder whose step reads no tensor on the host; see model.decoder.Decoder."""

    def advance(self, inputs: StepInputs, cache: Any) -> None: ...

    def logits(self, num_rows: int) -> torch.Tensor: ...


class Launched(Protocol):
    """Tokens on their way to the host."""

    def result(self) -> Sampled:
        """Once the submitted work is over."""


class Sampler(Protocol):
    """Chooses on the device."""

    tokens: torch.Tensor  # [max_num_seqs] int32: what the last launch chose, at one address

    def launch(
        self, logits: torch.Tensor, sequences: list[Sequence], places: list[int]
    ) -> Launched:
        """A token for each row of logits [rows, vocab_size] float32, which this may write over.

        places: how many tokens each sequence has put out before this one.
        """


Choose = Callable[[torch.Tensor], None]
FeedTokens = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""feed_tokens(token_ids, feed, sampled): token_ids[i] = sampled[feed[i]] where feed[i] >= 0"""


def _nobody(tokens: torch.Tensor) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Together:
    """Who computes a step with us. `share` makes the leader's tokens everybody's, on the device:
    the next step may take its inputs from them. `ranks`: of other DP ranks. `has_results`: the
    leader waits for us, of its followers on the last of several stages."""

    leads: bool = True
    share: Callable[[torch.Tensor], None] = _nobody
    ranks: Ranks = NO_RANKS
    num_stages: int = 1
    has_results: bool = False


BY_ITSELF = Together()


class CudaFlight:
    """A step on the device; among several stages, the choice of its tokens."""

    __slots__ = ("_began", "_ranks", "launched", "mark")

    def __init__(self, ranks: Ranks, began: Began | None) -> None:
        self.mark: Mark | None = None
        self.launched: Launched | None = None
        self._ranks = ranks
        self._began = began

    def done(self) -> bool:
        assert self.mark is not None
        return self.mark.query()

    def result(self) -> Sampled:
        assert self.mark is not None
        self.mark.synchronize()
        sampled = Sampled([], None) if self.launched is None else self.launched.result()
        return sampled._replace(ran=self._ranks.ran(self._began))


class CudaExecutor:
    """A model on a GPU, and what is between the scheduler and it."""

    def __init__(
        self,
        runtime: Runtime,
        model: Model,
        staging: CudaStaging,
        sampler: Sampler,
        feed_tokens: FeedTokens,
        together: Together = BY_ITSELF,
    ) -> None:
        self.team: Team = ALONE  # once all are warm; until then each member does the same by itself
        self._runtime = runtime
        self._together = together
        self._model = model
        self._staging = staging
        self._sampler = sampler
        self._feed_tokens = feed_tokens
        self._cache: Any = None
        self._graphs: dict[int, tuple[Callable[[], None], torch.Tensor]] = {}
        self._sizes: tuple[int, ...] = ()
        # Of a follower among several stages: rows of the steps without tokens, and what the leader
        # waits for, as far as it is not on its way to it.
        self._unchosen: deque[int] = deque()
        self._unsent: deque[Mark] = deque()
        self._watcher = Watcher("steps", runtime.thread_begins)

    @property
    def overlaps(self) -> bool:
        return self._together.ranks is NO_RANKS  # those wait for each other before each pass

    def opens_s(self) -> float:
        return self._together.ranks.opens_s()

    def called(self, departure: int) -> bool:
        return self._together.ranks.called(departure)

    def leave(self) -> bool:
        return self._together.ranks.leave()

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        """Sizes of the captured steps, rising."""
        return self._sizes

    def on_done(self, wake: Callable[[], None]) -> None:
        self._watcher.start(wake)
        self._together.ranks.on_called(wake)

    def use(self, cache: Any, spare_block: int) -> None:
        """The pages to work in from now on; what was captured goes with the old ones."""
        self._graphs.clear()
        self._sizes = ()
        self._cache = cache
        self._staging.spare_block = spare_block

    # ---- steps

    def launch(self, batch: Batch) -> Flight:
        size = None
        if batch.num_decodes == len(batch.work):
            size = bucket_for(batch.num_decodes, self._sizes)
        ranks, staging = self._together.ranks, self._staging
        flight = CudaFlight(ranks, ranks.enter(rank_work(batch)))
        staged = staging.build(batch) if size is None else staging.build_decodes(batch, size)
        number = self.team.step(lambda: staging.plan_of(staged))
        sequences = batch.sampled
        places = [work.num_output for work in batch.work if work.samples]

        def choose(logits: torch.Tensor) -> None:
            flight.launched = self._sampler.launch(logits, sequences, places)

        if self._together.num_stages == 1:
            flight.mark = self._whole(staged, choose)
            return flight
        self._advance(staged)

        def begin_choice() -> Flight:
            flight.mark = self._choice(len(sequences), choose)
            return flight

        return Passing(self.team, number, begin_choice)

    def follow(self, plan: bytes) -> None:
        """Take part in a step of our leader's; whoever waits for it waits there."""
        staged = self._staging.read(plan)
        if self._together.num_stages == 1:
            self._whole(staged, None)
            return
        self._unchosen.append(staged.counts.num_sampled)
        mark = self._advance(staged)
        if self._together.has_results:
            self._unsent.append(mark)

    def num_passed(self) -> int:
        """A step whose rows are computed: sending them is submitted, and waits for nobody."""
        count = 0
        while self._unsent and self._unsent[0].query():
            self._unsent.popleft()
            count += 1
        return count

    def choose(self) -> None:
        """With one stage tokens are chosen within the step."""
        if self._together.num_stages > 1:
            self._choice(self._unchosen.popleft(), None)

    def _whole(self, staged: Staged, choose: Choose | None) -> Mark:
        """A step of one stage."""
        size, count = staged.counts.size, staged.counts.num_sampled

        def step() -> None:
            self._staging.upload(staged)
            logits = self._replay(size) if size else self._eager(staged)
            self._choose_among(logits[:count], choose)

        mark = staged.buffer.reader = self._submit(step)
        return mark

    def _advance(self, staged: Staged) -> Mark:
        """Our stage's part of a step."""

        def step() -> None:
            self._staging.upload(staged)
            self._model.advance(staged.inputs, self._cache)

        mark = staged.buffer.reader = self._submit(step)
        return mark

    def _choice(self, count: int, choose: Choose | None) -> Mark:
        """Tokens of the step that advanced first of those that have none."""
        return self._submit(lambda: self._choose_among(self._model.logits(count), choose))

    def _choose_among(self, logits: torch.Tensor, choose: Choose | None) -> None:
        """The leader's `choose` gets the logits of those that want a token, and all that are in
        the step get the tokens."""
        if not len(logits):
            return
        tokens = self._sampler.tokens[: len(logits)]
        if choose is not None and self._together.leads:
            choose(logits)
        else:
            tokens.zero_()
        self._together.share(tokens)

    def _submit(self, work: Callable[[], None]) -> Mark:
        mark = self._runtime.submit(work)
        self._watcher.watch(mark)
        return mark

    def _eager(self, staged: Staged) -> torch.Tensor:
        if staged.feed is not None:
            self._feed_tokens(staged.inputs.token_ids, staged.feed, self._sampler.tokens)
        return self._forward(staged.inputs)

    def _forward(self, inputs: StepInputs) -> torch.Tensor:
        self._model.advance(inputs, self._cache)
        return self._model.logits(inputs.logit_rows.numel())

    def _replay(self, size: int) -> torch.Tensor:
        replay, logits = self._graphs[size]
        replay()
        return logits

    # ---- graphs

    def capture(
        self, sizes: Iterable[int], progress: Callable[[int, int], None], agree: Agree
    ) -> None:
        """Record decode steps of these sizes, largest first: smaller ones then fit its memory.

        A size that any member of the team cannot record is nobody's: all replay the same step.
        """
        falling = sorted(sizes, reverse=True)
        gc.collect()
        for done, size in enumerate(falling):
            progress(done, len(falling))
            try:
                self._capture(size)
            except RuntimeError as problem:
                reason = str(problem).strip().partition("\n")[0]
                logger.warning(
                    "no graph for %d sequences, such steps take a larger one or none: %s",
                    size,
                    reason,
                )
            if not agree(f"graph of {size}", int(size in self._graphs)):
                self._graphs.pop(size, None)
        self._sizes = tuple(sorted(self._graphs))
        progress(len(falling), len(falling))

    def _capture(self, size: int) -> None:
        inputs, feed = self._staging.decode_inputs(size)
        found: list[torch.Tensor] = []

        def step() -> None:
            self._feed_tokens(inputs.token_ids, feed, self._sampler.tokens)
            found[:] = [self._forward(inputs)]

        # Once for real: kernels are compiled and libraries make their workspaces outside a capture.
        staged = self._staging.build_decodes(idle_decodes(size, self._staging.spare_block), size)

        def first() -> None:
            self._staging.upload(staged)
            step()

        self._runtime.submit(first).synchronize()
        replay = self._runtime.capture(step)
        self._graphs[size] = (replay, found[0])

    # ---- warm-up

    def warm_up(
        self,
        max_tokens: int,
        max_seqs: int,
        max_context_len: int,
        block_size: int,
        vocab_size: int,
    ) -> None:
        """The largest prefill and the largest decode, whose memory is then known, and whatever
        else has kernels of its own: to compile one while serving would stall a step by seconds.
        Prompts have many words: one alone would go to a few experts, and other ranks get no row.

        In the spare block alone: every table points there, and nobody reads what comes out.
        """
        block = self._staging.spare_block
        longest = max_context_len - 1
        for lengths in warm_up_prompts(max_tokens, max_seqs, longest):
            self.launch(idle_prefills(lengths, block, block_size, vocab_size)).result()
        self.launch(idle_decodes(max_seqs, block, drawn=True)).result()
        if self._together.num_stages == 1:  # with more, nobody takes inputs from a step under way
            self.launch(idle_decodes(1, block, fed=True)).result()


def warm_up_prompts(max_tokens: int, max_seqs: int, longest: int) -> list[list[int]]:
    """Lengths of the prompts of the steps that meet every kernel which prompts may need: the
    largest step, then few and many prompts at once, all of them short or not."""
    full: list[int] = []
    left = max_tokens
    while left and len(full) < max_seqs:
        full.append(min(left, longest))
        left -= full[-1]
    steps, count = [full], 0
    while count < min(max_seqs, max_tokens):
        count = min(seq_bucket(count + 1), max_seqs, max_tokens)
        steps.append([1] * count)
        if seq_bucket(count) != seq_bucket(len(full)):
            steps.append([min(longest, max_tokens - count + 1)] + [1] * (count - 1))
    return steps


def idle_decodes(count: int, block: int, drawn: bool = False, fed: bool = False) -> Batch:
    """Decodes of sequences that nobody asked for, each with one token at place 0; `fed`: the one
    that the step before chose in this row."""
    sampling = Sampling(temperature=0.7, top_p=0.9, seed=0) if drawn else Sampling(temperature=0.0)
    work = []
    for index in range(count):
        sequence = Sequence(-1 - index, array("i", [0]), 1, sampling)
        sequence.block_ids.append(block)
        work.append(Work(sequence, 0, 1, True, index if fed else None))
    return Batch(work, num_decodes=count)


def idle_prefills(lengths: list[int], block: int, block_size: int, vocab_size: int) -> Batch:
    """Prompts that nobody sent, of one word after the other."""
    words = itertools.cycle(range(vocab_size))
    work: list[Work] = []
    for count in lengths:
        token_ids = array("i", itertools.islice(words, count))
        sequence = Sequence(-1 - len(work), token_ids, count, Sampling(temperature=0))
        sequence.block_ids.extend([block] * blocks_for(count, block_size))
        work.append(Work(sequence, 0, count, True))
    return Batch(work, num_prefill_tokens=sum(lengths))
