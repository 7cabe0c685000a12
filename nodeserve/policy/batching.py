"""The words of a worker's batching: a sequence and its stages, a batch of work, what came of it.

`policy/scheduler.py` decides; executors read what it decided. A batch may be launched behind one
whose tokens nobody has read yet: then an input token is named by its place among those
(`Work.feed`), and `Sequence.token_ids` lacks it. So executors take what they need of a sequence's
length from `Work`, never from `token_ids`, and copy the block ids when they are launched.
"""

import enum
from array import array
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nodeserve.errors import ConfigError, OutOfBlocks, PromptTooLong
from nodeserve.policy.blocks import blocks_for
from nodeserve.types import Sampling

GOES_ON, STOP, LENGTH = range(3)  # places in wire.messages.FINISH_REASONS


class Stage(enum.Enum):
    NEW = enum.auto()  # not taken yet
    WAITING = enum.auto()  # prefill not finished
    RUNNING = enum.auto()  # one token a step
    PULLING = enum.auto()  # its pages are on their way here
    PINNED = enum.auto()  # prefilled, its pages wait for a peer
    GONE = enum.auto()  # finished, preempted, released or cancelled; see Scheduler on its blocks


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on this worker. `token_ids` grows by what was read from finished steps.

    The KV of the first `num_computed` tokens exists, or a launched step writes it. A running
    sequence has one token to come from each of its `num_launched` steps.
    """

    request_id: int
    token_ids: "array[int]" = field(repr=False)  # what people wrote is in no error and no log
    num_prompt_tokens: int
    sampling: Sampling
    handoff: bool = False
    received_s: float = 0.0  # when the worker got it
    num_computed: int = 0
    block_ids: "array[int]" = field(default_factory=lambda: array("i"))
    stage: Stage = Stage.NEW
    arrival: int = -1
    stop_ids: frozenset[int] = frozenset()
    max_len: int = 0  # tokens, prompt and output, at which the request ends
    num_launched: int = 0  # launched steps that compute some of it and are not committed
    place: int = -1  # of its token among those of the latest batch that gave it one
    device_state: Any = None  # the executor's own notes; they go when the sequence goes

    @property
    def num_output(self) -> int:
        """Output tokens read so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    def append(self, token_id: int) -> int:
        """Take the next token; whether and why the request ends with it."""
        tokens = self.token_ids
        tokens.append(token_id)
        if token_id in self.stop_ids and self.num_output > self.sampling.min_tokens:
            return STOP
        return LENGTH if len(tokens) >= self.max_len else GOES_ON


class Work(NamedTuple):
    """`num_tokens` of a sequence from `start` on; `samples` if its last one is among them.

    With a `feed` the one input token is not in `sequence.token_ids` yet: it is the token at this
    place among those of the batch launched just before.
    """

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
    started: list[Sequence] = field(default_factory=list)  # those of which it has the first chunk
    preempted: list[int] = field(default_factory=list)

    @property
    def sampled(self) -> list[Sequence]:
        """Sequences that get a token, in the order in which `commit` takes the tokens."""
        return [work.sequence for work in self.work if work.samples]


class Outcome(NamedTuple):
    """What one step did for the sequences that are still here, ready to be told."""

    request_ids: list[int]
    token_ids: list[int]
    finish: list[int]
    kv_ready: list[tuple[int, "array[int]"]]
    kept: list[int]  # places of `token_ids` among the tokens of the step


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds one worker."""

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    num_stages: int = 1  # batches, of different sequences, that may be under way at once

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max-num-batched-tokens ({self.max_num_batched_tokens}) must be at least"
                f" max-num-seqs ({self.max_num_seqs}): every running request takes one token a step"
            )

    def max_len(self, sequence: Sequence) -> int:
        """Tokens, prompt and output, at which it ends."""
        return min(sequence.num_prompt_tokens + sequence.sampling.max_tokens, self.max_model_len)

    def check_fits(self, sequence: Sequence) -> None:
        """PromptTooLong or OutOfBlocks if it could not run even alone."""
        num_tokens = len(sequence.token_ids)
        if num_tokens >= self.max_model_len:
            raise PromptTooLong(
                f"{num_tokens} tokens leave no room for a new one in a context of"
                f" {self.max_model_len}"
            )
        longest = num_tokens + 1 if sequence.handoff else self.max_len(sequence)
        # Its last token's KV is never written.
        if (needed := blocks_for(longest - 1, self.block_size)) > self.num_blocks:
            raise OutOfBlocks(
                f"{longest} tokens need {needed} KV blocks, the whole pool has"
                f" {self.num_blocks}: give more --kv-memory or a smaller max_tokens"
            )
