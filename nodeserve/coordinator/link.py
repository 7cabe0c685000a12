"""One life of one worker as the coordinator sees it: its channel, its process, what it holds.

A worker that is started again gets a new link with new rings; whatever the last one still says, or
is said about it, is about a link that is no longer alive.
"""

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass, field

from nodeserve.errors import NodeServeError, RingError, WorkerLost
from nodeserve.layout import Shape
from nodeserve.metrics import Rate
from nodeserve.policy.account import Account
from nodeserve.policy.startup import Start
from nodeserve.policy.watchdog import Watchdog
from nodeserve.types import Load, Role
from nodeserve.wire.channel import CoordinatorEnd
from nodeserve.wire.messages import (
    TO_WORKER,
    AttachPages,
    Cancel,
    Prefill,
    Prompt,
    PullKv,
    Ready,
    ReleaseKv,
    StepDone,
    ToWorker,
)

NUM_STDERR_LINES = 20
STARTING, READY, LOST = "starting", "ready", "lost"
RESTARTING, TAKEN_OUT = "restarting", "taken out"  # lost as well: what comes of it


@dataclass(slots=True)
class Counters:
    """What a worker has done since it started."""

    steps: int = 0
    tokens: int = 0
    handoffs: int = 0
    handoff_bytes: int = 0
    handoff_s: float = 0.0  # of copying them
    prompt_tokens: int = 0
    busy_s: float = 0.0  # of all steps; one may begin while another runs
    step_s: float = 0.0  # of the last step
    token_rate: Rate = field(default_factory=Rate)
    prompt_rate: Rate = field(default_factory=Rate)

    def count_step(self, step: StepDone, now_s: float) -> None:
        num_tokens = len(step.finish)
        self.steps += 1
        self.step_s = step.step_s
        self.busy_s += step.step_s
        self.tokens += num_tokens
        self.token_rate.add(num_tokens, now_s)
        if step.num_prefill_tokens:
            self.prompt_tokens += step.num_prefill_tokens
            self.prompt_rate.add(step.num_prefill_tokens, now_s)


class WorkerLink:
    """The coordinator's half of one worker, for one life.

    `account` is the policy's view of it: what was sent counts at once, and every load that the
    worker reports replaces the estimate.
    """

    def __init__(self, index: int, role: Role, channel: CoordinatorEnd, pages_fd: int) -> None:
        loop = asyncio.get_running_loop()
        self.index = index
        self.role = role
        self.channel = channel
        self.pages_fd = pages_fd
        self.gpu: int | None = None  # its number, for people
        self.instance = index  # number of its instance; the ranks of one share it
        self.rank = 0  # its place in the instance
        self.shape = Shape()  # of the instance
        self.mapped = False  # it has opened its rings, and with them other workers' doorbells
        self.stands_in = False  # for the phase that is not its own, since nobody else is there
        self.state = STARTING
        self.joining = False  # it gets no requests yet: peers are about to map pages
        self.num_restarts = 0  # lives before this one
        self.reason = ""  # why the last one ended
        self.restart_at_s: float | None = None  # when the next one begins, if this one is over
        self.process: asyncio.subprocess.Process | None = None
        self.ready: asyncio.Future[Ready] = loop.create_future()
        self.death: asyncio.Future[NodeServeError] = loop.create_future()  # why this life is over
        self.attaching: dict[int, asyncio.Future[None]] = {}  # peers whose pages it is to map
        self.info: Ready | None = None
        self.account = Account(0)
        self.offered: set[int] = set()  # requests whose pages it keeps for others to read
        self.num_sent = self.num_received = 0  # records, those that wait for room included
        self.start: Start | None = None  # how far it is, once there is a process
        self.tail: list[int] | None = None  # during an audit: requests of records after its Count
        self.watchdog = Watchdog()
        self.counters = Counters()
        self.stderr_tail: deque[str] = deque(maxlen=NUM_STDERR_LINES)
        self.rung = asyncio.Event()

    @property
    def alive(self) -> bool:
        return self.state == READY

    @property
    def leader(self) -> int:
        """The worker that has the queue and the scheduler of its team: itself, if it has them."""
        return self.index - self.rank % self.shape.team_size

    @property
    def leads(self) -> bool:
        """Whether requests are given to it. A follower does what its leader tells it."""
        return self.rank % self.shape.team_size == 0

    @property
    def place(self) -> list[int]:
        """Which part of every block it holds, as AttachPages has it."""
        pp_rank, tp_rank = divmod(self.rank % self.shape.team_size, self.shape.tp)
        return [tp_rank, self.shape.tp, pp_rank, self.shape.pp]

    @property
    def gone(self) -> bool:
        """Nothing is sent to it or taken from it any more."""
        return self.state not in (STARTING, READY)

    @property
    def acting(self) -> Role:
        """What it does now."""
        return Role.MIXED if self.stands_in else self.role

    @property
    def prefills(self) -> bool:
        """Whether it takes prompts."""
        return self.acting is not Role.DECODE

    @property
    def pulls(self) -> bool:
        """Whether it has mapped the pages of those that only prefill, and decodes what they did."""
        return self.role is not Role.PREFILL

    @property
    def busy(self) -> bool:
        """It has work that it can do. Prompts alone, and pages that are not offered yet, may have
        to wait for the room of offered ones until peers have taken those."""
        load, account = self.account.load, self.account
        if load.num_pinned and not load.num_running:
            return not self.offered  # else they are being copied to where peers can read them
        return account.num_sequences > load.num_pinned

    def is_ready(self, info: Ready) -> None:
        """It can take requests from now on."""
        self.info, self.state = info, READY
        self.account.num_blocks = info.num_blocks
        self.account.report(Load(0, 0, 0, info.num_blocks, 0, 0))

    def attach(self, owner: "WorkerLink") -> "asyncio.Future[None]":
        """Let it map the pages of a ready one; done when it has, or when it has ended."""
        assert owner.info is not None
        pages = owner.pages_fd, owner.info.pages_bytes, owner.info.pages_handle
        self.send(AttachPages(owner.index, *pages, owner.leader, owner.place))
        loop = asyncio.get_running_loop()
        return self.attaching.setdefault(owner.index, loop.create_future())

    def has_attached(self, peer: int) -> None:
        """It has mapped that worker's pages."""
        if waiting := self.attaching.pop(peer, None):
            waiting.set_result(None)

    def report(self, load: list[int]) -> None:
        """Take over a load that the worker sent."""
        self.account.report(Load._make(load))

    def send(self, message: ToWorker) -> None:
        """Queue a record; never blocks, never loses. A lost worker gets nothing."""
        if self.tail is not None and isinstance(message, PullKv | ReleaseKv | Cancel):
            self.tail.append(message.request_id)
        self._post(TO_WORKER.encode(message))

    def send_prompts(self, departure: int, prompts: list[Prompt]) -> None:
        """One Prefill, or as few as the ring's largest record allows."""
        record = TO_WORKER.encode(Prefill(departure, prompts))
        if len(record) > self.channel.inbox.max_record_bytes and len(prompts) > 1:
            half = len(prompts) // 2
            self.send_prompts(0, prompts[:half])
            self.send_prompts(departure, prompts[half:])
        else:
            if self.tail is not None:
                self.tail += [prompt.request_id for prompt in prompts]
            self._post(record)

    def _post(self, record: bytes) -> None:
        if self.gone:
            return
        try:
            self.channel.inbox.post(record)
            self.num_sent += 1
        except RingError as error:
            self.give_up(f"cannot be reached: {error}")

    def give_up(self, why: str) -> None:
        """End it, for a reason that its process cannot give; nothing if it has ended."""
        self.end(self.lost(why))
        self.kill()

    def kill(self) -> None:
        """SIGKILL: a worker heeds no other signal."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()

    def end(self, error: NodeServeError) -> None:
        """This life is over. The first to say so gives the reason."""
        if not self.death.done():
            self.death.set_result(error)

    def lost(self, how: str) -> WorkerLost:
        """The error for the end of this life."""
        return WorkerLost(f"{self.role.value} worker {self.index} {how}")
