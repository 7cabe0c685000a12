"""The step loop of one worker: the same for every role and device.

Always true: all records of a step are in the ring before the next step begins, and one StepDone
tells everything a step did. Each message is answered before the next one is looked at, so an answer
never describes a state that a later message made.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

from nodeserve.errors import NodeServeError
from nodeserve.policy.batching import Batch, Outcome, Sequence
from nodeserve.policy.scheduler import Scheduler
from nodeserve.types import sampling_from
from nodeserve.wire.messages import (
    AttachPages,
    Cancel,
    Dropped,
    FromWorker,
    KvPulled,
    KvReady,
    KvRefused,
    PagesAttached,
    Prefill,
    PullKv,
    ReleaseKv,
    RequestFailed,
    Shutdown,
    StepDone,
    ToWorker,
    pack_ids,
    pack_request_ids,
    unpack_ids,
)
from nodeserve.worker.contract import Executor, Landed, Offered, Sampled, Ticket, Transfer

IDLE_WAIT_S = 1.0  # bounds the heartbeat's age, nothing else


class Link(Protocol):
    """Our end of the two rings."""

    def drain(self) -> list[ToWorker]: ...

    def wait(self, timeout_s: float) -> None:
        """Return when there is a message, or after `timeout_s`."""

    def put(self, message: FromWorker) -> None:
        """Blocks while the ring is full: a slow coordinator slows us, and loses nothing."""

    def beat(self) -> None: ...


class Runner:
    """Carries out what the scheduler decides."""

    def __init__(
        self, link: Link, scheduler: Scheduler, executor: Executor, transfer: Transfer
    ) -> None:
        self.link = link
        self.scheduler = scheduler
        self.executor = executor
        self.transfer = transfer
        self.stopped = False
        self._take: dict[type, Callable[[Any], None]] = {
            Prefill: self._prefill,
            PullKv: self._pull,
            ReleaseKv: self._release,
            Cancel: self._cancel,
            AttachPages: self._attach,
            Shutdown: self._shutdown,
        }

    def run(self) -> None:
        """Step until told to stop."""
        while not self.stopped:
            self.step()

    def step(self) -> None:
        self.link.beat()
        for message in self.link.drain():
            self._take[type(message)](message)
        for moved in self.transfer.poll():
            self._on_moved(moved)
        batch = self.scheduler.next_batch()
        if batch is None:
            self._idle()
            return
        began = time.perf_counter()
        sampled = self.executor.launch(batch).result()
        outcome = self.scheduler.commit(batch, sampled.token_ids)
        kv_ready = self._offer(outcome)
        self.link.put(self._report(batch, sampled, outcome, kv_ready, time.perf_counter() - began))

    def _idle(self) -> None:
        if not self.transfer.busy and not self.stopped:
            self.link.wait(IDLE_WAIT_S)

    # ---- messages

    def _prefill(self, message: Prefill) -> None:
        try:
            self.scheduler.submit(_sequence(message, message.handoff))
        except NodeServeError as problem:
            self._fail(message.request_id, problem)

    def _pull(self, message: PullKv) -> None:
        try:
            sequence = _sequence(message, handoff=False)
            if not self.scheduler.begin_pull(sequence):
                self.link.put(KvRefused(message.request_id, self.scheduler.load()))
                return
            pages = pack_ids(self.scheduler.computed_blocks(sequence))
            self.transfer.begin(
                Ticket(message.request_id, message.source, message.block_ids, pages)
            )
        except NodeServeError as problem:
            self.scheduler.cancel(message.request_id)
            self._fail(message.request_id, problem)

    def _on_moved(self, moved: Landed | Offered) -> None:
        if isinstance(moved, Offered):
            self.link.put(KvReady(*moved))
            return
        self.scheduler.finish_pull(moved.request_id)
        self.link.put(KvPulled(*moved))

    def _release(self, message: ReleaseKv) -> None:
        self.transfer.withdraw(message.request_id)
        self.scheduler.release(message.request_id)
        self.link.put(Dropped(message.request_id, self.scheduler.load()))

    def _cancel(self, message: Cancel) -> None:
        self.transfer.cancel(message.request_id)
        self.scheduler.cancel(message.request_id)
        self.link.put(Dropped(message.request_id, self.scheduler.load()))

    def _attach(self, message: AttachPages) -> None:
        self.transfer.attach(*message)
        self.link.put(PagesAttached(message.worker))

    def _shutdown(self, message: Shutdown) -> None:
        self.stopped = True

    def _fail(self, request_id: int, problem: NodeServeError) -> None:
        self.link.put(RequestFailed(request_id, problem.code, str(problem)))

    # ---- answers

    def _offer(self, outcome: Outcome) -> list[list[object]]:
        """Prefilled requests whose pages peers may read at once; the others follow by KvReady."""
        offers = (
            (request_id, self.transfer.offer(request_id, pack_ids(block_ids)))
            for request_id, block_ids in outcome.kv_ready
        )
        return [[request_id, ids] for request_id, ids in offers if ids is not None]

    def _report(
        self,
        batch: Batch,
        sampled: Sampled,
        outcome: Outcome,
        kv_ready: list[list[object]],
        seconds: float,
    ) -> StepDone:
        logprobs = [list(row) for row in sampled.logprobs] if sampled.logprobs else None
        return StepDone(
            request_ids=pack_request_ids(outcome.request_ids),
            token_ids=pack_ids(outcome.token_ids),
            finish=bytes(outcome.finish),
            logprobs=logprobs,
            kv_ready=kv_ready,
            started=pack_request_ids(batch.started),
            preempted=pack_request_ids(batch.preempted),
            load=self.scheduler.load(),
            step_s=seconds,
            num_prefill_tokens=batch.num_prefill_tokens,
        )


def _sequence(message: Prefill | PullKv, handoff: bool) -> Sequence:
    return Sequence(
        request_id=message.request_id,
        token_ids=unpack_ids(message.token_ids),
        num_prompt_tokens=message.num_prompt_tokens,
        sampling=sampling_from(message.sampling),
        handoff=handoff,
    )
