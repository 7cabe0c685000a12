"""One worker as the coordinator sees it: its channel, its process, what it holds."""

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass, field

from nodeserve.errors import NodeServeError, RingError
from nodeserve.metrics import Rate
from nodeserve.policy.account import Account
from nodeserve.policy.startup import Start
from nodeserve.types import Load, Role
from nodeserve.wire.channel import CoordinatorEnd
from nodeserve.wire.messages import (
    TO_WORKER,
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


@dataclass(slots=True)
class Counters:
    """What a worker has done since it started."""

    steps: int = 0
    tokens: int = 0
    handoffs: int = 0
    handoff_bytes: int = 0
    step_s: float = 0.0  # of the last step
    token_rate: Rate = field(default_factory=Rate)
    prompt_rate: Rate = field(default_factory=Rate)

    def count_step(self, step: StepDone, now_s: float) -> None:
        num_tokens = len(step.finish)
        self.steps += 1
        self.step_s = step.step_s
        self.tokens += num_tokens
        self.token_rate.add(num_tokens, now_s)
        if step.num_prefill_tokens:
            self.prompt_rate.add(step.num_prefill_tokens, now_s)


class WorkerLink:
    """The coordinator's half of one worker.

    `account` is the policy's view of it: what was sent counts at once, and every load that the
    worker reports replaces the estimate.
    """

    def __init__(self, index: int, role: Role, channel: CoordinatorEnd, pages_fd: int) -> None:
        self.index = index
        self.role = role
        self.channel = channel
        self.pages_fd = pages_fd
        self.gpu: int | None = None  # its number, for people
        self.instance = index  # number of its instance; the ranks of one share it
        self.rank = 0  # its place in the instance
        self.state = "starting"
        self.process: asyncio.subprocess.Process | None = None
        self.ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self.info: Ready | None = None
        self.account = Account(0)
        self.num_sent = self.num_received = 0  # records, those that wait for room included
        self.start: Start | None = None  # how far it is, once there is a process
        self.num_unattached = 0  # AttachPages without an answer yet
        self.tail: list[int] | None = None  # during an audit: requests of records after its Count
        self.counters = Counters()
        self.stderr_tail: deque[str] = deque(maxlen=NUM_STDERR_LINES)
        self.rung = asyncio.Event()

    @property
    def alive(self) -> bool:
        return self.state == "ready"

    @property
    def prefills(self) -> bool:
        return self.role is not Role.DECODE

    @property
    def decodes(self) -> bool:
        return self.role is not Role.PREFILL

    def is_ready(self, info: Ready) -> None:
        """It can take requests from now on."""
        self.info, self.state = info, "ready"
        self.account.num_blocks = info.num_blocks
        self.account.report(Load(0, 0, 0, info.num_blocks, 0, 0))

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
        if self.state == "lost":
            return
        try:
            self.channel.inbox.post(record)
            self.num_sent += 1
        except RingError as error:
            self.give_up(error)

    def give_up(self, error: NodeServeError) -> None:
        """Its rings cannot be trusted any more: end it, and its end is handled as any other."""
        self.stderr_tail.append(str(error))
        self.kill()

    def kill(self) -> None:
        """SIGKILL: a worker heeds no other signal."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
