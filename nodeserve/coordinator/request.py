"""One request as the coordinator knows it: its tokens, its phase, who holds it, its times."""

from array import array
from dataclasses import dataclass, field
from typing import Any, Protocol

from nodeserve.policy.blocks import blocks_for
from nodeserve.policy.lifecycle import Event, Phase, advance
from nodeserve.types import Timings
from nodeserve.wire.messages import End, Prefill, PullKv, pack_ids


class Reader(Protocol):
    """Whoever a request's tokens go to: a client's connection."""

    def mark(self, request: "Request") -> None: ...

    def flush(self) -> None: ...

    def end(self, request: "Request", end: End) -> None: ...


@dataclass(slots=True)
class Stamps:
    """Monotonic times of a request's turning points, in seconds; None: not reached."""

    arrived: float
    started: float | None = None
    first_token: float | None = None
    parked: float = 0.0  # the last time its pages became ready
    last_token: float | None = None


@dataclass(slots=True, eq=False)
class Request:
    """All state of one request. Only the coordinator changes it, in the loop's thread.

    `tokens` is the prompt and every token emitted so far; `num_sent` of them the client has been
    given (or never needs: the prompt). `holder` is the worker that computes it, `source` the one
    whose pinned pages wait for, or are read by, the holder.
    """

    request_id: int
    client_id: int
    stream: Reader
    tokens: "array[int]"
    num_prompt_tokens: int
    sampling: dict[str, Any]
    slo: dict[str, Any] | None
    priority: int
    stamps: Stamps
    phase: Phase = Phase.WAITING
    num_sent: int = 0
    dirty: bool = False
    wants_logprobs: bool = False
    logprobs: list[Any] = field(default_factory=list)
    holder: int = -1
    source: int = -1
    source_blocks: bytes = b""
    waiting_for: set[int] = field(default_factory=set)  # workers that owe a Dropped
    prefill_worker: int = -1
    decode_worker: int = -1
    handoff_wait_s: float = 0.0
    handoff_s: float = 0.0
    handoff_bytes: int = 0
    num_preemptions: int = 0
    num_losses: int = 0  # workers that ended while they computed it

    def on(self, event: Event) -> None:
        """The one place where a phase changes."""
        self.phase = advance(self.phase, event)

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    def num_blocks(self, block_size: int) -> int:
        """Blocks for all its tokens and the one that comes next."""
        return blocks_for(len(self.tokens) + 1, block_size)

    def prefill_message(self, *, handoff: bool) -> Prefill:
        ids = pack_ids(self.tokens)
        return Prefill(self.request_id, ids, self.num_prompt_tokens, self.sampling, handoff)

    def pull_message(self) -> PullKv:
        return PullKv(
            self.request_id,
            self.source,
            self.source_blocks,
            pack_ids(self.tokens),
            self.num_prompt_tokens,
            self.sampling,
        )

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
        }

    def timings(self, now_s: float) -> Timings:
        """Where the time went up to now; stages not reached are 0."""
        stamps = self.stamps
        started = stamps.started if stamps.started is not None else now_s
        first = stamps.first_token
        return Timings(
            queue_s=started - stamps.arrived,
            prefill_s=(first - started) if first is not None else 0.0,
            handoff_wait_s=self.handoff_wait_s,
            handoff_s=self.handoff_s,
            handoff_bytes=self.handoff_bytes,
            decode_s=(stamps.last_token or first) - first if first is not None else 0.0,
            prefill_worker=self.prefill_worker,
            decode_worker=self.decode_worker,
            num_preemptions=self.num_preemptions,
        )
