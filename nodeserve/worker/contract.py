"""What the step loop needs from a device, in words that need no torch.

The step loop, the rings, the scheduler and the handoff are the same for every device; a device
brings an `Executor` that computes batches and a `Transfer` that moves pages. Tests bring fakes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from nodeserve.config import WorkerSpec
from nodeserve.policy.batching import Batch

Progress = Callable[[str, int, int], None]  # phase, done, total


class Logprobs(NamedTuple):
    """Of one sampled token; `row` is its place among the step's tokens. Bytes as on the wire."""

    row: int
    logprob: float
    top_ids: bytes
    top_logprobs: bytes


class Sampled(NamedTuple):
    """The tokens of `batch.sampled`, in that order, and logprobs of those that asked."""

    token_ids: list[int]
    logprobs: list[Logprobs] | None


class Executor(Protocol):
    """Computes one batch: writes its KV into the worker's pages and chooses tokens."""

    def run(self, batch: Batch) -> Sampled: ...


class Ticket(NamedTuple):
    """One pull: copy a peer's `source_ids` blocks into our `target_ids`, pairwise."""

    request_id: int
    source: int
    source_ids: bytes  # int32
    target_ids: bytes


class Landed(NamedTuple):
    """A finished pull."""

    request_id: int
    num_bytes: int
    seconds: float


class Transfer(Protocol):
    """Moves pages from peers' pools into ours.

    A copy may outlive `begin`; its pages on both sides must stay as they are until it is in a
    `poll`'s answer or `cancel` returned.
    """

    def attach(self, worker: int, fd: int, num_bytes: int) -> None: ...

    def begin(self, ticket: Ticket) -> None:
        """HandoffFailed when the peer is unknown or a block is not in its pool."""

    def poll(self) -> list[Landed]: ...

    def cancel(self, request_id: int) -> None:
        """When this returns, no page is read or written for this request any more."""

    @property
    def busy(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Device:
    """A device that is loaded and warm."""

    executor: Executor
    transfer: Transfer
    num_blocks: int
    block_bytes: int
    num_threads: int
    kernels: str
    eos_token_ids: frozenset[int]


Load = Callable[[WorkerSpec, Progress], Device]
