"""One request as the coordinator knows it: its tokens, its phase, who holds it, its times."""

import math
from array import array
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

from nodeserve.policy.blocks import blocks_for
from nodeserve.policy.flow import NO_OBJECTIVE
from nodeserve.policy.foresight import Forecast
from nodeserve.policy.ledger import Ended
from nodeserve.policy.lifecycle import Event, Phase, advance
from nodeserve.policy.units import Waiting
from nodeserve.types import Slo, Timings
from nodeserve.wire.messages import End, Prompt, PullKv, pack_ids


class Reader(Protocol):
    """Whoever a request's tokens go to: a client's connection, `paused` while it does not read."""

    @property
    def paused(self) -> bool: ...

    def mark(self, request: "Request") -> None: ...

    def flush(self) -> None: ...

    def end(self, request: "Request", end: End) -> None: ...


@dataclass(slots=True)
class Stamps:
    """Monotonic times of a request's turning points, in seconds; None: not reached."""

    arrived: float
    departed: float | None = None  # from the buffer
    received: float | None = None  # by the worker
    started: float | None = None  # its first pass
    prefilled: float | None = None  # the pass that gave the first token ended
    first_token: float | None = None
    parked: float = 0.0  # the last time its pages became ready
    last_token: float | None = None
    # First token written to a client that had not read before; infinite while it is kept for it.
    told: float | None = None
    lost: float | None = None  # when it lost its place, after the first token and until the next
    lost_before_s: float = 0.0
    lost_after_s: float = 0.0

    def lose(self, now_s: float) -> None:
        """It has to begin again: what it has no token of was for nothing."""
        if self.first_token is None:
            self.lost_before_s = now_s - self.arrived
        elif self.lost is None:
            self.lost = now_s

    def regain(self, now_s: float) -> None:
        """A token has come, perhaps after a loss."""
        if self.lost is not None:
            self.lost_after_s += now_s - self.lost
            self.lost = None

    def depart(self, now_s: float) -> None:
        """Leave the buffer, perhaps again: what happened after the time before does not count."""
        self.departed = now_s
        self.received = self.started = self.prefilled = None

    def start(self, received_s: float, began_s: float) -> None:
        """Its first pass has ended. A turn may be dated half a millisecond ahead (turns.py), and
        nothing is received before it departs."""
        self.received = received_s if self.departed is None else max(received_s, self.departed)
        self.started = max(began_s, self.received)

    def ttft_stages(self, now_s: float) -> tuple[float, float, float, float, float]:
        """The first five of Timings: the one that it is in ends now, later ones are 0."""
        times = (self.arrived, self.departed, self.received, self.started, self.prefilled)
        ended = [now_s if time is None else time for time in (*times, self.first_token)]
        waited, sent, queued, computed, returned = (b - a for a, b in pairwise(ended))
        return waited, sent, queued, computed, returned


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
    tokens: "array[int]" = field(repr=False)  # what people wrote is in no error and no log
    num_prompt_tokens: int
    sampling: dict[str, Any] = field(repr=False)  # its constraint is their words as well
    slo: dict[str, Any] | None
    max_tokens: int
    waiting: Waiting  # its place in the buffer: the present one, or the last
    stamps: Stamps
    objective: Slo = NO_OBJECTIVE  # what it is held to: its own limits, or the server's
    forecast: Forecast | None = None  # when it came in; None: there was none, or it is void
    phase: Phase = Phase.WAITING
    num_sent: int = 0
    dirty: bool = False
    wants_logprobs: bool = False
    logprobs: list[Any] = field(default_factory=list)
    handoff: bool = False  # its first token comes with pages for another worker
    holder: int = -1
    source: int = -1
    source_blocks: bytes = b""
    parked_blocks: int = 0  # that it had when its pages last became ready
    waiting_for: set[int] = field(default_factory=set)  # workers that owe a Dropped
    prefill_worker: int = -1
    decode_worker: int = -1
    handoff_wait_s: float = 0.0
    handoff_s: float = 0.0
    handoff_bytes: int = 0
    num_preemptions: int = 0
    num_losses: int = 0  # workers that ended while they had it
    suspect_until: int = 0  # until it has so many tokens it may be why they did
    num_failed_handoffs: int = 0

    def on(self, event: Event) -> None:
        """The one place where a phase changes."""
        self.phase = advance(self.phase, event)

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def is_suspect(self) -> bool:
        """It goes on alone among those that may be why workers ended (policy/suspects.py)."""
        return len(self.tokens) < self.suspect_until

    def num_blocks(self, block_size: int) -> int:
        """Blocks for all its tokens and the one that comes next."""
        return blocks_for(len(self.tokens) + 1, block_size)

    def prompt(self) -> Prompt:
        ids = pack_ids(self.tokens)
        return Prompt(self.request_id, ids, self.num_prompt_tokens, self.sampling, self.handoff)

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
        stamps, first = self.stamps, self.stamps.first_token
        return Timings(
            *stamps.ttft_stages(now_s),
            self.handoff_wait_s,
            self.handoff_s,
            self.handoff_bytes,
            (stamps.last_token or first) - first if first is not None else 0.0,
            self.prefill_worker,
            self.decode_worker,
            self.num_preemptions,
            self.waiting.rounds,
            stamps.lost_before_s,
            stamps.lost_after_s,
        )

    def ended(self, outcome: str, timings: Timings, now_s: float) -> Ended:
        """What counts of it once it is over."""
        return Ended(
            self.request_id,
            outcome,
            self.objective,
            timings,
            self.client_wait_s(now_s),
            self.num_prompt_tokens,
            self.num_output_tokens,
        )

    def client_wait_s(self, now_s: float) -> float:
        """What its first token waited, or waits, for the client to read."""
        stamps = self.stamps
        if stamps.first_token is None:
            return 0.0
        if stamps.told is not None:
            return min(stamps.told, now_s) - stamps.first_token
        return now_s - stamps.first_token if self.stream.paused and self.awaits_reader else 0.0

    @property
    def awaits_reader(self) -> bool:
        """It has a first token that the client was not given."""
        if self.stamps.told is not None:
            return math.isinf(self.stamps.told)
        return self.num_sent <= self.num_prompt_tokens < len(self.tokens)
