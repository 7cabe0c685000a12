"""What the step loop needs from a device, in words that need no torch.

The step loop, the rings, the scheduler and the handoff are the same for every device; a device
brings an `Executor` that computes batches and a `Transfer` that moves pages. Tests bring fakes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from nodeserve.config import WorkerSpec
from nodeserve.errors import NodeServeError
from nodeserve.policy.batching import Batch
from nodeserve.policy.copy_plan import CopyRun, PageShard

Progress = Callable[[str, int, int], None]  # phase, done, total
Agree = Callable[[str, int], int]
"""The smallest of the team's values for a name, of which each member gives its own."""


class Logprobs(NamedTuple):
    """Of one sampled token; `row` is its place among the step's tokens. Bytes as on the wire."""

    row: int
    logprob: float
    top_ids: bytes
    top_logprobs: bytes


class Ran(NamedTuple):
    """When a step ran, where the device itself keeps count of steps."""

    number: int  # the same on all ranks of an instance
    began_s: float
    seconds: float


class Failure(NamedTuple):
    """A sequence that has no next token: it cannot go on, all others of the step can."""

    row: int  # its place among the step's tokens, where some token is that nobody may see
    problem: NodeServeError


class Sampled(NamedTuple):
    """The tokens of `batch.sampled`, in that order, and logprobs of those that asked."""

    token_ids: list[int]
    logprobs: list[Logprobs] | None
    ran: Ran | None = None  # None: from its launch, or the end of the step before, to its end
    failed: tuple[Failure, ...] = ()


class Flight(Protocol):
    """A launched step, on its way. Steps end in the order of their launches."""

    def done(self) -> bool:
        """Whether `result` would return at once."""

    def result(self) -> Sampled:
        """Wait for the step's tokens. Called once, in the order of the launches."""


class Computed:
    """A step that was over when its launch returned."""

    def __init__(self, sampled: Sampled) -> None:
        self._sampled = sampled

    def done(self) -> bool:
        return True

    def result(self) -> Sampled:
        return self._sampled


class Passing:
    """The `number`-th step of a team, on its way through several stages. When the last one has sent
    what the step gave, `choose` begins the choice of its tokens."""

    def __init__(self, team: "Team", number: int, choose: Callable[[], Flight]) -> None:
        self._team = team
        self._number = number
        self._choose = choose
        self._choice: Flight | None = None

    def done(self) -> bool:
        if self._choice is None:
            if not self._team.has_passed(self._number):
                return False
            self._choice = self._begin()
        return self._choice.done()

    def result(self) -> Sampled:
        return (self._choice or self._begin()).result()

    def _begin(self) -> Flight:
        self._team.choose()
        return self._choose()


class Executor(Protocol):
    """Computes batches: writes their KV into the worker's pages and chooses tokens."""

    @property
    def overlaps(self) -> bool:
        """Whether a batch may be launched before the tokens of the one before are known.

        Works with a `feed` then take their input token from the step launched just before, on the
        device. At most one launched step waits behind the one that runs.
        """

    def opens_s(self) -> float:
        """When the first of several stages is free, on the worker's clock: a batch planned earlier
        would only miss who comes meanwhile. -inf: at any time; inf: `on_done`'s `wake` tells."""

    def called(self, departure: int) -> bool:
        """Whether other ranks of the instance wait for this one, which has received all up to this
        departure, and know of no later one: then it launches an empty batch if it has no other.
        If they come to wait later, `on_done`'s `wake` tells. Asked before each launch."""

    def launch(self, batch: Batch) -> Flight:
        """Begin a step; steps run in the order of their launches. May compute at once.

        The batch's sequences change afterwards: tokens of earlier steps are appended, blocks are
        added, a sequence may be cancelled. Its blocks are nobody else's until the step has ended.
        ShuttingDown, and nothing begun, where other ranks of the instance stop.
        """

    def leave(self) -> bool:
        """We stop: no step begins any more on any rank. Whether other ranks are in one that does
        not end without us, so that an empty batch has to be launched for them."""

    def on_done(self, wake: Callable[[], None]) -> None:
        """Call `wake`, from any thread, whenever a step has ended that was not over when `launch`
        returned; its flight is `done` by then. One call too many is harmless."""


class Team(Protocol):
    """The workers that compute one DP rank's steps together, as its leader sees them."""

    @property
    def num_followers(self) -> int: ...

    def step(self, plan: Callable[[], bytes]) -> int:
        """Let the followers begin a step; `plan` is what their `Following.follow` gets. The step's
        number, the first being 1."""

    def has_passed(self, number: int) -> bool:
        """Whether the last stage has sent us what step `number` gave."""

    def wait(self) -> None:
        """Until a follower may have said something."""

    def choose(self) -> None:
        """Let them take part in the choice of tokens of the oldest step without."""

    def warm(self) -> None:
        """All steps so far were for warming up: nothing that followers counted in them is told."""

    def least_blocks(self, num_blocks: int) -> int:
        """What all have room for, if we have room for so many. Waits until each can take steps."""


class Alone:
    """The team of a worker that has no followers."""

    @property
    def num_followers(self) -> int:
        return 0

    def step(self, plan: Callable[[], bytes]) -> int:
        return 0

    def has_passed(self, number: int) -> bool:
        return True

    def wait(self) -> None:
        pass

    def choose(self) -> None:
        pass

    def warm(self) -> None:
        pass

    def least_blocks(self, num_blocks: int) -> int:
        return num_blocks


ALONE: Team = Alone()


class Following(Protocol):
    """A follower's part of steps, in the order of its leader's."""

    def follow(self, plan: bytes) -> None:
        """Take part in a step. May compute at once."""

    def num_passed(self) -> int:
        """Of how many steps more than at the last call this has sent the leader what it waits for:
        the results. The executor's `on_done` tells when one has passed outside of `follow`."""

    def choose(self) -> None:
        """Take part in the choice of tokens of the oldest step without."""


class Ticket(NamedTuple):
    """One pull: copy a team's `source_ids` blocks into our `target_ids`, pairwise."""

    request_id: int
    source: int  # the team's leader
    source_ids: bytes  # int32
    target_ids: bytes


class Source(NamedTuple):
    """The pages of one worker of a team, and what we copy of each of its blocks."""

    worker: int
    fd: int
    num_bytes: int
    handle: bytes
    block_bytes: int  # of a block there
    runs: tuple[CopyRun, ...]


class Landed(NamedTuple):
    """A finished pull."""

    request_id: int
    num_bytes: int
    seconds: float


class Offered(NamedTuple):
    """A finished request's pages that peers may read from now on, by the ids they must use."""

    request_id: int
    block_ids: bytes  # int32


class CopyFailed(NamedTuple):
    """A pull or an offer that came to nothing: no page is read or written for it any more."""

    request_id: int
    problem: NodeServeError


Moved = Landed | Offered | CopyFailed


class Transfer(Protocol):
    """Moves pages from peers' pools into ours, and lets peers read ours.

    A copy may outlive `begin`; its pages on both sides must stay as they are until it is in a
    `poll`'s answer or `cancel` returned. All calls may come while a step runs.
    """

    def on_done(self, wake: Callable[[], None]) -> None:
        """Call `wake`, from any thread, whenever a `poll` would answer something that was not
        there before, unless it is `busy`. One call too many is harmless."""

    def attach(self, team: int, sources: Sequence[Source]) -> None:
        """Map the pools that pulls from this team need, together they have all of our part of a
        block: by `handle` where there is one, else the memory behind `fd`. Again after the team was
        started again. `team` is its leader's number."""

    def detach(self, team: int) -> list[int]:
        """Unmap the pools of a team that has ended, if they were mapped. The requests whose pulls
        from there were not over: no page is read or written for them any more."""

    def offer(self, request_id: int, block_ids: bytes) -> bytes | None:
        """Let peers read these computed blocks: the ids to tell them, or None when `poll` will
        tell. Our own blocks stay as they are until `withdraw`."""

    def withdraw(self, request_id: int) -> None:
        """The peer has the offered pages, or nobody wants them any more."""

    def begin(self, ticket: Ticket) -> None:
        """HandoffFailed when the peer is unknown or a block is not in its pool."""

    def poll(self) -> "list[Moved]":
        """What ended since the last time."""

    def cancel(self, request_id: int) -> None:
        """When this returns, no page is read or written for this request any more."""

    @property
    def busy(self) -> bool:
        """Whether `poll` itself moves pages and is to be called again without a wait. Not for a
        copy that another engine carries out: `on_done` tells of its end."""


class ExpertRows(NamedTuple):
    """Where our rows went, as wire.experts.ExpertsCounted has it."""

    layers: bytes
    experts: bytes
    ranks: bytes


NO_ROWS = ExpertRows(b"", b"", b"")


def count_nothing() -> ExpertRows:
    return NO_ROWS


def forget_nothing() -> None:
    """There are no rows."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device that is loaded and warm."""

    executor: Executor
    transfer: Transfer
    num_blocks: int
    block_bytes: int
    pages: PageShard  # our part of every block
    pages_bytes: int  # what a peer maps to pull from here
    pages_handle: bytes  # how: a CUDA IPC handle, or empty for the memory behind pages_fd
    num_threads: int
    kernels: str  # for the start log and `status`
    handoff: str  # how pages leave this worker, likewise
    eos_token_ids: frozenset[int]
    following: Following | None = None  # of a follower, whose executor launches nothing
    num_stages: int = 1  # steps, of different sequences, that can be under way at once
    attention_weight: float = 0.0  # where they should take equally long: see policy.batching.Limits
    # Of ranks that share experts, since the device was warm; may wait for a running step.
    expert_rows: Callable[[], ExpertRows] = count_nothing
    forget_rows: Callable[[], None] = forget_nothing  # of a follower, once its leader says Warm


Load = Callable[[WorkerSpec, Progress, Team], Device]
