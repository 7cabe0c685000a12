"""One worker as the coordinator sees it: its channel, its process, its last reported load."""

import asyncio
from collections import deque
from dataclasses import dataclass, field

from nodeserve.errors import NodeServeError, RingError
from nodeserve.metrics import Rate
from nodeserve.policy.decode_allocation import DecodeLoad
from nodeserve.policy.prefill_allocation import PrefillLoad
from nodeserve.types import Load, Role
from nodeserve.wire.channel import CoordinatorEnd
from nodeserve.wire.messages import TO_WORKER, Ready, StepDone, ToWorker

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

    `prefill` and `decode` are the policy's view: what was assigned is taken off at once, and every
    report of the worker replaces the estimate, less what it cannot know yet (`on_the_way`).
    """

    def __init__(self, index: int, role: Role, channel: CoordinatorEnd, pages_fd: int) -> None:
        self.index = index
        self.role = role
        self.channel = channel
        self.pages_fd = pages_fd
        self.gpu: int | None = None  # its number, for people
        self.instance = index  # its number; the ranks of an instance share one
        self.rank = 0  # its place in the instance
        self.state = "starting"
        self.process: asyncio.subprocess.Process | None = None
        self.ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self.info: Ready | None = None
        self.load = Load(0, 0, 0, 0, 0, 0)
        self.counters = Counters()
        self.stderr_tail: deque[str] = deque(maxlen=NUM_STDERR_LINES)
        self.rung = asyncio.Event()
        self.requests: set[int] = set()  # request ids that this worker computes or will compute
        self.prefill = PrefillLoad(index, 0, 0, 0, 0)
        self.decode = DecodeLoad(index, 0, 0, False)
        self.on_the_way: dict[int, int] = {}  # request id -> blocks promised, not yet reported
        self._prefill_left: dict[int, int] = {}  # request id -> prompt tokens, in order of arrival

    @property
    def alive(self) -> bool:
        return self.state == "ready"

    @property
    def prefills(self) -> bool:
        return self.role is not Role.DECODE

    @property
    def decodes(self) -> bool:
        return self.role is not Role.PREFILL

    def send(self, message: ToWorker) -> None:
        """Queue a record; never blocks, never loses. A lost worker gets nothing."""
        if self.state == "lost":
            return
        try:
            self.channel.inbox.post(TO_WORKER.encode(message))
        except RingError as error:
            self.give_up(error)

    def give_up(self, error: NodeServeError) -> None:
        """Its rings cannot be trusted any more: end it, and its end is handled as any other."""
        self.stderr_tail.append(str(error))
        if self.process is not None and self.process.returncode is None:
            self.process.kill()

    def promise(self, request_id: int, num_blocks: int) -> None:
        """Count blocks that the worker will take but has not reported yet."""
        self.requests.add(request_id)
        self.on_the_way[request_id] = num_blocks
        self._estimate()

    def arrived(self, request_id: int) -> None:
        """The worker's reports include this request from now on."""
        self.on_the_way.pop(request_id, None)

    def owe_prefill(self, request_id: int, num_tokens: int) -> None:
        """`num_tokens` of a prompt were sent to this worker."""
        self._prefill_left[request_id] = num_tokens
        self.prefill.outstanding_tokens += num_tokens

    def pay_prefill(self, num_tokens: int) -> None:
        """A step computed `num_tokens` prompt tokens: workers prefill first come, first served."""
        for request_id, left in self._prefill_left.items():
            paid = min(left, num_tokens)
            self._prefill_left[request_id] = left - paid
            self.prefill.outstanding_tokens -= paid
            num_tokens -= paid
            if not num_tokens:
                return

    def prefilled(self, request_id: int) -> None:
        """No prompt token of this request is left to compute here."""
        self.prefill.outstanding_tokens -= self._prefill_left.pop(request_id, 0)

    def forget(self, request_id: int) -> None:
        self.prefilled(request_id)
        self.requests.discard(request_id)
        self.on_the_way.pop(request_id, None)
        self._estimate()

    def report(self, load: list[int]) -> None:
        """Take over a load that the worker sent."""
        self.load = Load._make(load)
        self.decode.refused = False
        self._estimate()

    def _estimate(self) -> None:
        free = self.load.num_free_blocks - sum(self.on_the_way.values())
        self.prefill.free_blocks = self.decode.free_blocks = free
        self.prefill.num_sequences = self.decode.num_sequences = len(self.requests)
