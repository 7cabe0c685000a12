"""The step loop of one worker: the same for every role and device.

A turn takes in what has come (messages, landed pages, the end of a step), begins what can begin and
sleeps until something else comes. So a message is taken in the middle of a running step, and a copy
that it asks for runs beside it. Where the device overlaps, the next step is launched behind the
running one, as late as the pacer finds safe; where launching is computing, a turn is a step.

Always true: steps are told in the order of their launches, and one StepDone tells everything a step
did, also when nobody is left who wants its tokens: it carries the load, which changed. Each message
is answered before the next one is looked at, so an answer never describes a state that a later
message made.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from nodeserve.errors import CudaError, HandoffFailed, NodeServeError, ShuttingDown
from nodeserve.policy.batching import Batch, Outcome, Sequence, Stage
from nodeserve.policy.cost import rank_work
from nodeserve.policy.pacing import Pacer
from nodeserve.policy.scheduler import Scheduler
from nodeserve.types import sampling_from
from nodeserve.wire.messages import (
    Alive,
    AttachPages,
    Cancel,
    Count,
    CountExperts,
    DetachPages,
    Dropped,
    ExpertsCounted,
    FromWorker,
    KvPulled,
    KvReady,
    KvRefused,
    PagesAttached,
    Prefill,
    Probe,
    Prompt,
    PullKv,
    ReleaseKv,
    RequestFailed,
    Shutdown,
    StepDone,
    ToWorker,
    pack_ids,
    pack_request_ids,
    pack_times,
    unpack_ids,
)
from nodeserve.worker.contract import (
    CopyFailed,
    Executor,
    ExpertRows,
    Failure,
    Flight,
    Logprobs,
    Moved,
    Offered,
    Ran,
    Ticket,
    Transfer,
    count_nothing,
)
from nodeserve.worker.count import counted
from nodeserve.worker.peer_seats import PeerSeats


class Link(Protocol):
    """Our end of the two rings."""

    @property
    def num_sent(self) -> int:
        """Records that were put."""

    def drain(self) -> list[ToWorker]: ...

    def wait(self, timeout_s: float) -> None:
        """Return when there is a message, after a `wake` since the last return, or after
        `timeout_s`."""

    def wake(self) -> None:
        """End the wait that is under way, or else the next one; from any thread."""

    def put(self, message: FromWorker) -> None:
        """Blocks while the ring is full: a slow coordinator slows us, and loses nothing."""

    def beat(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way."""

    batch: Batch
    flight: Flight
    launched_s: float


class Runner:
    """Carries out what the scheduler decides. `clock` is monotonic, in seconds; `idle_wait_s`
    bounds the age of the last sign of life, nothing else."""

    def __init__(
        self,
        link: Link,
        scheduler: Scheduler,
        executor: Executor,
        transfer: Transfer,
        seats: PeerSeats,
        clock: Callable[[], float] = time.perf_counter,
        door_s: float = 0.0,
        idle_wait_s: float = 1.0,
        expert_rows: Callable[[], ExpertRows] = count_nothing,
    ) -> None:
        self.link = link
        self.scheduler = scheduler
        self.executor = executor
        self.transfer = transfer
        self._seats = seats
        self.stopped = False
        self._clock = clock
        self._pacer = Pacer()
        # Not told yet: the first runs, at most one waits; or the stages' steps.
        self._launched: deque[Launched] = deque()
        self._ended_s = 0.0  # when the last step ended
        self._door_s = door_s
        self._idle_wait_s = idle_wait_s
        self._expert_rows = expert_rows
        self._door_until_s = -math.inf  # the next pass waits until then for who may board it
        self._departure = 0  # the newest that we received whole
        self._num_received = 0  # prompts and pulls
        self._num_records = 0
        self._num_steps = 0
        executor.on_done(link.wake)
        transfer.on_done(link.wake)
        self._take: dict[type, Callable[[Any], None]] = {
            Prefill: self._prefill,
            PullKv: self._pull,
            ReleaseKv: self._release,
            Cancel: self._cancel,
            AttachPages: self._attach,
            DetachPages: self._detach,
            Shutdown: self._shutdown,
            Probe: self._probe,
            Count: self._count,
            CountExperts: self._count_experts,
        }

    def run(self) -> None:
        """Turn until told to stop; then no step writes to the pages any more."""
        while not self.stopped:
            self.turn()
        flights = [launched.flight for launched in self._launched]
        if self.executor.leave():
            flights.append(self.executor.launch(Batch()))
        for flight in flights:
            flight.result()

    def turn(self) -> None:
        """What has come, then what can begin; sleeps if nothing can."""
        self.link.beat()
        for message in self.link.drain():
            self._num_records += 1
            self._take[type(message)](message)
        for moved in self.transfer.poll():
            self._on_moved(moved)
        self._land()
        wait_s = self._begin()
        if wait_s > 0.0 and not self.transfer.busy and not self.stopped:
            self.link.wait(wait_s)

    # ---- steps

    def _begin(self) -> float:
        """Launch a step if it is time and there is one; else how long to wait for what comes."""
        now_s = self._clock()
        due_s = max(self._due_s(), self._door_until_s)
        if now_s < due_s:
            return min(due_s - now_s, self._idle_wait_s)
        batch = self.scheduler.next_batch(
            ahead=bool(self._launched), idle=self.executor.called(self._departure)
        )
        if batch is None:
            return self._idle_wait_s
        try:
            flight = self.executor.launch(batch)
        except ShuttingDown:  # another rank of our instance was told first
            self.stopped = True
            return 0.0
        self._launched.append(Launched(batch, flight, now_s))
        if not batch.num_prefill_tokens:
            self._pacer.launched(self._clock() - now_s)
        self._land()  # if launching was computing
        return 0.0

    def _due_s(self) -> float:
        """When the next step may be planned."""
        num_stages = self.scheduler.limits.num_stages
        if len(self._launched) < num_stages:
            return self.executor.opens_s()
        if num_stages > 1 or len(self._launched) > 1 or not self.executor.overlaps:
            return math.inf
        running = self._launched[0]
        began_s = max(running.launched_s, self._ended_s)
        return self._pacer.due_s(began_s, running.batch.num_decodes)

    def _land(self) -> None:
        """Tell of the steps that are over."""
        while self._launched and self._launched[0].flight.done():
            self._tell(self._launched.popleft(), self._clock())

    def _tell(self, step: Launched, ended_s: float) -> None:
        sampled = step.flight.result()
        began_s = max(step.launched_s, self._ended_s)
        self._num_steps += 1
        ran = sampled.ran or Ran(self._num_steps, began_s, ended_s - began_s)
        self._ended_s = ended_s
        if not step.batch.num_prefill_tokens:
            self._pacer.ended(step.batch.num_decodes, ran.seconds)
        failed = self._give_up(step.batch, sampled.failed)
        outcome = self.scheduler.commit(step.batch, sampled.token_ids)
        if self._door_s and self.scheduler.has_prompts:
            self._door_until_s = ended_s + self._door_s
        kv_ready = self._offer(outcome)
        logprobs = _told(sampled.logprobs, outcome.kept)
        self.link.put(self._report(step.batch, outcome, logprobs, kv_ready, ran))
        for request_id, problem in failed:
            self._fail(request_id, problem)

    def _give_up(
        self, batch: Batch, failures: Iterable[Failure]
    ) -> list[tuple[int, NodeServeError]]:
        """Forget those that have no next token, but those gone anyway; which to tell of."""
        sampled = batch.sampled if failures else []
        failed = [(sampled[row], problem) for row, problem in failures]
        here = [(one, problem) for one, problem in failed if one.stage is not Stage.GONE]
        for sequence, _ in here:
            self.scheduler.cancel(sequence.request_id)
        return [(sequence.request_id, problem) for sequence, problem in here]

    # ---- messages

    def _prefill(self, message: Prefill) -> None:
        now_s = self._clock()
        if message.departure:
            self._departure = message.departure
            self._door_until_s = -math.inf
        for fields in message.prompts:
            prompt = Prompt(*fields)
            self._num_received += 1
            try:
                self.scheduler.submit(_sequence(prompt, prompt.handoff, now_s))
            except NodeServeError as problem:
                self._fail(prompt.request_id, problem)

    def _pull(self, message: PullKv) -> None:
        self._num_received += 1
        try:
            sequence = _sequence(message, False, self._clock())
            if not self.scheduler.begin_pull(sequence):
                self.link.put(KvRefused(message.request_id, self._load()))
                return
            pages = pack_ids(self.scheduler.computed_blocks(sequence))
            self.transfer.begin(
                Ticket(message.request_id, message.source, message.block_ids, pages)
            )
        except CudaError:
            raise  # not this request's: the device is lost, and an idle worker would never notice
        except NodeServeError as problem:
            self.scheduler.cancel(message.request_id)
            self._fail(message.request_id, problem)

    def _on_moved(self, moved: Moved) -> None:
        if isinstance(moved, CopyFailed):
            self.scheduler.cancel(moved.request_id)
            self._fail(*moved)
            return
        if isinstance(moved, Offered):
            self.link.put(KvReady(*moved))
            return
        self.scheduler.finish_pull(moved.request_id)
        self.link.put(KvPulled(*moved))

    def _release(self, message: ReleaseKv) -> None:
        self.transfer.withdraw(message.request_id)
        self.scheduler.release(message.request_id)
        self.link.put(Dropped(message.request_id, self._load()))

    def _cancel(self, message: Cancel) -> None:
        self.transfer.cancel(message.request_id)
        self.scheduler.cancel(message.request_id)
        self.link.put(Dropped(message.request_id, self._load()))

    def _attach(self, message: AttachPages) -> None:
        self._seats.attach(message)
        self.link.put(PagesAttached(message.worker))

    def _detach(self, message: DetachPages) -> None:
        for request_id in self._seats.detach(message.worker):
            gone = HandoffFailed(f"worker {message.worker} ended before its pages were copied")
            self._on_moved(CopyFailed(request_id, gone))

    def _probe(self, message: Probe) -> None:
        self.link.put(Alive(self._load()))

    def _count(self, message: Count) -> None:
        untold = (step.batch for step in self._launched)
        records = self._num_records, self.link.num_sent + 1
        self.link.put(counted(message.number, self.scheduler, untold, self._load(), *records))

    def _count_experts(self, message: CountExperts) -> None:
        self.link.put(ExpertsCounted(message.number, *self._expert_rows()))

    def _shutdown(self, message: Shutdown) -> None:
        self.stopped = True

    def _fail(self, request_id: int, problem: NodeServeError) -> None:
        self.link.put(RequestFailed(request_id, problem.code, str(problem), self._load()))

    # ---- answers

    def _load(self) -> list[int]:
        return [*self.scheduler.load(), self._num_received]

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
        outcome: Outcome,
        logprobs: list[list[object]] | None,
        kv_ready: list[list[object]],
        ran: Ran,
    ) -> StepDone:
        work = rank_work(batch)
        return StepDone(
            request_ids=pack_request_ids(outcome.request_ids),
            token_ids=pack_ids(outcome.token_ids),
            finish=bytes(outcome.finish),
            logprobs=logprobs,
            kv_ready=kv_ready,
            started=pack_request_ids(sequence.request_id for sequence in batch.started),
            preempted=pack_request_ids(batch.preempted),
            load=self._load(),
            step=ran.number,
            began_s=ran.began_s,
            step_s=ran.seconds,
            num_prefill_tokens=work.prefill_tokens,
            attention=work.attention,
            num_decodes=work.num_decodes,
            kv_tokens=work.kv_tokens,
            received=pack_times(sequence.received_s for sequence in batch.started),
        )


def _told(logprobs: list[Logprobs] | None, kept: list[int]) -> list[list[object]] | None:
    """With the places that the step's tokens have once those of sequences gone are dropped."""
    if not logprobs:
        return None
    rows = {place: row for row, place in enumerate(kept)}
    return [[rows[place], *entry] for place, *entry in logprobs if place in rows] or None


def _sequence(message: Prompt | PullKv, handoff: bool, now_s: float) -> Sequence:
    return Sequence(
        request_id=message.request_id,
        token_ids=unpack_ids(message.token_ids),
        num_prompt_tokens=message.num_prompt_tokens,
        sampling=sampling_from(message.sampling),
        handoff=handoff,
        received_s=now_s,
    )
