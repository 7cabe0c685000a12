"""One request of a simulation as the coordinator knows it."""

from array import array
from dataclasses import dataclass

from nodeserve.plan.records import Arrival, Served
from nodeserve.policy.batching import Sequence as Tokens
from nodeserve.policy.blocks import blocks_for
from nodeserve.policy.decode_allocation import ReadyKv
from nodeserve.policy.foresight import Forecast
from nodeserve.policy.lifecycle import Event, Phase, advance
from nodeserve.policy.units import Waiting
from nodeserve.types import Sampling, Timings


@dataclass(slots=True, eq=False)
class Life:
    """`num_tokens` are those of the prompt and those that the coordinator has seen since, `max_len`
    those with which it ends, `parked_blocks` its blocks when its pages last became ready. `holder`
    is the rank that computes it, `source` the one whose pinned pages wait for, or are read by, the
    holder. Times are None until they are reached."""

    request_id: int
    arrival: Arrival
    num_tokens: int
    max_len: int
    sampling: Sampling
    best_effort: bool = False
    forecast: Forecast | None = None  # when it came in; None: there was none, or it is void
    refused_for: str = ""  # the limit that it would have missed
    phase: Phase = Phase.WAITING
    holder: int = -1
    source: int = -1
    num_rounds: int = 0
    departed_s: float = 0.0
    received_s: float = 0.0
    started_s: float = 0.0
    prefilled_s: float = 0.0
    first_token_s: float | None = None
    parked_s: float = 0.0
    parked_blocks: int = 0
    handoff_wait_s: float = 0.0
    handoff_s: float = 0.0
    handoff_bytes: int = 0
    prefill_worker: int = -1
    decode_worker: int = -1
    num_preemptions: int = 0

    def on(self, event: Event) -> None:
        """The one place where a phase changes."""
        self.phase = advance(self.phase, event)

    def waiting(self, block_size: int) -> Waiting:
        """What the dispatcher is told of it, now or again."""
        return Waiting(
            self.request_id,
            self.num_tokens,
            blocks_for(self.num_tokens + 1, block_size),
            self.arrival.arrived_s,
            self.arrival.priority,
            self.best_effort,
            rounds=self.num_rounds,
        )

    def ready(self, block_size: int) -> ReadyKv:
        """What the decode allocator is told of it."""
        num_blocks = self.parked_blocks
        return ReadyKv(
            self.request_id, num_blocks, max(0, blocks_for(self.max_len, block_size) - num_blocks)
        )

    def grown_blocks(self, block_size: int) -> int:
        """What it took more when it ended."""
        return blocks_for(self.max_len + 1, block_size) - self.parked_blocks

    def stay(self, now_s: float) -> tuple[Forecast | None, float, int]:
        """What was forecast of it, and how long its tokens after the first took to come."""
        return (
            self.forecast,
            now_s - (self.first_token_s or now_s),
            self.max_len - self.arrival.num_prompt_tokens - 1,
        )

    def tokens(self, now_s: float, *, handoff: bool) -> Tokens:
        """What travels to a rank: the number of tokens counts, their values do not."""
        return Tokens(
            self.request_id,
            array("i", bytes(4 * self.num_tokens)),
            self.arrival.num_prompt_tokens,
            self.sampling,
            handoff,
            now_s,
        )

    def served(self, now_s: float, outcome: str, num_output_tokens: int) -> Served:
        """The request ended."""
        first_s = self.first_token_s
        if first_s is None:  # refused, or its node is gone: the buffer is all it saw for sure
            wait_s = now_s - self.arrival.arrived_s
            return Served(self.arrival, Timings(wait_s), now_s, outcome, None, self.refused_for)
        decode_s = now_s - first_s
        timings = Timings(
            self.departed_s - self.arrival.arrived_s,
            self.received_s - self.departed_s,
            self.started_s - self.received_s,
            self.prefilled_s - self.started_s,
            first_s - self.prefilled_s,
            self.handoff_wait_s,
            self.handoff_s,
            self.handoff_bytes,
            decode_s,
            self.prefill_worker,
            self.decode_worker,
            self.num_preemptions,
            self.num_rounds,
        )
        tpot_s = decode_s / (num_output_tokens - 1) if num_output_tokens > 1 else None
        return Served(self.arrival, timings, now_s, outcome, tpot_s)
