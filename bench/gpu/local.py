"""A worker without rings and coordinator: the real step loop over a loaded device, in this process.

What a section measures this way is the engine itself; requests go in and tokens come out as the
messages that travel through rings otherwise.
"""

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

from nodeserve.config import WorkerSpec
from nodeserve.errors import NodeServeError
from nodeserve.policy.scheduler import Scheduler
from nodeserve.types import Sampling, sampling_to
from nodeserve.wire.messages import (
    FromWorker,
    Prefill,
    Prompt,
    RequestFailed,
    StepDone,
    ToWorker,
    pack_ids,
    unpack_ids,
    unpack_request_ids,
)
from nodeserve.worker.contract import Device
from nodeserve.worker.peer_seats import PeerSeats
from nodeserve.worker.process import limits
from nodeserve.worker.runner import Runner


class LocalLink:
    """Both rings as queues; a wait ends with a wake."""

    def __init__(self) -> None:
        self.said: deque[FromWorker] = deque()
        self.num_sent = 0
        self._messages: deque[ToWorker] = deque()
        self._rung = threading.Event()

    def post(self, message: ToWorker) -> None:
        self._messages.append(message)
        self._rung.set()

    def drain(self) -> list[ToWorker]:
        messages = list(self._messages)
        self._messages.clear()
        return messages

    def wait(self, timeout_s: float) -> None:
        self._rung.wait(timeout_s)
        self._rung.clear()

    def wake(self) -> None:
        self._rung.set()

    def put(self, message: FromWorker) -> None:
        self.said.append(message)
        self.num_sent += 1

    def beat(self) -> None:
        pass


class LocalWorker:
    """Drives one device; remembers the tokens and logprobs of every request."""

    def __init__(self, device: Device, spec: WorkerSpec) -> None:
        self.link = LocalLink()
        scheduler = Scheduler(limits(spec, device))
        seats = PeerSeats(device.transfer, device.pages)
        self.runner = Runner(self.link, scheduler, device.executor, device.transfer, seats)
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[Any]] = {}
        self.finished: set[int] = set()
        self.steps: list[StepDone] = []

    def submit(self, request_id: int, prompt: Sequence[int], **sampling: Any) -> None:
        values = sampling_to(Sampling(**{"temperature": 0.0, "ignore_eos": True, **sampling}))
        self.link.post(
            Prefill(0, [Prompt(request_id, pack_ids(prompt), len(prompt), values, False)])
        )

    def turn(self) -> None:
        """One turn of the step loop, and what it told."""
        self.runner.turn()
        while self.link.said:
            self._take(self.link.said.popleft())

    def run(self, *request_ids: int) -> None:
        """Until all of these have ended."""
        while not self.finished.issuperset(request_ids):
            self.turn()

    def until_decoding(self, count: int) -> None:
        """Until that many sequences have their first token."""
        while len(self.tokens) < count:
            self.turn()

    def _take(self, message: FromWorker) -> None:
        if isinstance(message, RequestFailed):
            raise NodeServeError(f"request {message.request_id}: {message.message}")
        if not isinstance(message, StepDone):
            return
        self.steps.append(message)
        ids = unpack_request_ids(message.request_ids)
        rows = {row[0]: row[1:] for row in message.logprobs or ()}
        tokens = unpack_ids(message.token_ids)
        for place, (one, token, end) in enumerate(zip(ids, tokens, message.finish, strict=True)):
            self.tokens.setdefault(one, []).append(token)
            if place in rows:
                self.logprobs.setdefault(one, []).append(rows[place])
            if end:
                self.finished.add(one)
