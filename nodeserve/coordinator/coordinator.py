"""The coordinator: every request, every queue, every decision of the node, in one thread.

It owns all request state. Clients reach it through `submit` and `abort`, workers through `handle`.
These only take in what came and ask for a `turn`, which decides on all of it at once (dispatch.py);
what it decides leaves through the workers' rings and the clients' streams. It knows token ids
only: text lives with the clients.

Always true: a request accepted by `submit` ends with exactly one End on its stream; pages pinned on
a worker are released once nobody reads them.
"""

from collections.abc import Callable, Sequence

from nodeserve.coordinator.admission import Limits, admit, check_vocabulary
from nodeserve.coordinator.dispatch import Dispatch
from nodeserve.coordinator.link import LOST, WorkerLink
from nodeserve.coordinator.policies import Policies
from nodeserve.coordinator.records import check_holder
from nodeserve.coordinator.request import Reader, Request
from nodeserve.coordinator.setbacks import Setbacks
from nodeserve.coordinator.streams import Stream, end_of, refusal
from nodeserve.coordinator.tally import Tally
from nodeserve.coordinator.tracer import Tracer
from nodeserve.errors import (
    HandoffFailed,
    InvalidRequest,
    NodeServeError,
    Overloaded,
    ProtocolError,
    ShuttingDown,
    from_code,
)
from nodeserve.metrics import Totals
from nodeserve.policy.ledger import Ledger
from nodeserve.policy.lifecycle import Event, Phase
from nodeserve.wire.messages import (
    FINISH_REASONS,
    Alive,
    Cancel,
    Counted,
    Dropped,
    FromWorker,
    KvPulled,
    KvReady,
    KvRefused,
    RequestFailed,
    StepDone,
    Submit,
    unpack_ids,
    unpack_request_ids,
    unpack_times,
)

LEAST_RETRY_S = 1.0


class Coordinator:
    """See the module's head. `now` is a monotonic clock; `wake` asks for one `turn`."""

    def __init__(
        self,
        links: list[WorkerLink],
        limits: Limits,
        policies: Policies,
        now: Callable[[], float],
        wake: Callable[[], None],
    ) -> None:
        self.links = links
        self.limits = limits
        self.requests: dict[int, Request] = {}
        self.streams: set[Stream] = set()  # open connections
        self.tracer = Tracer(links, now, wake)
        self.dispatch = Dispatch(links, self.requests, limits, policies, self.tracer)
        self.setbacks = Setbacks(links, self.dispatch, self.tracer, now, self._fail)
        self.totals = Totals()
        self.ledger = Ledger(now())
        self.tally = Tally()
        self.closes_s: float | None = None  # it stops, and by then at the latest it is over
        self.farewell: NodeServeError | None = None  # that every new connection is told
        self.on_idle: Callable[[], object] = lambda: None  # while it stops: nobody waits any more
        self.on_left: Callable[[], object] = lambda: None  # a connection is gone
        self.on_counted: Callable[[WorkerLink, Counted], object] = lambda *_: None  # for an audit
        self._now = now
        self._wake = wake
        self._moved: dict[Reader, None] = {}
        self._next_id = 1

    @property
    def num_accepted(self) -> int:
        """Requests so far."""
        return self._next_id - 1

    @property
    def is_idle(self) -> bool:
        """Every request has ended for its client; workers may still have to let go of some."""
        return not any(stream.requests for stream in self.streams)

    # ---- clients

    def submit(self, stream: Stream, message: Submit) -> None:
        """Accept a request, or end it at once with the error that says why not."""
        try:
            request = self._accept(stream, message)
        except NodeServeError as error:
            self.totals.rejected += 1
            self.tally.refused(error.code)
            self.tracer.refused(error.code)
            stream.send(refusal(message.request_id, error))
            return
        self.requests[request.request_id] = request
        stream.requests[request.client_id] = request
        self.dispatch.push(request, request.stamps.arrived)
        self.tracer.arrived(request)
        self._wake()

    def abort(self, request: Request) -> None:
        """The client no longer wants it, or is gone."""
        self._end(request, Event.CANCELLED, "cancelled", "cancelled", "cancelled by the client")
        self._wake()

    def drop_stream(self, stream: Stream, error: NodeServeError | None = None) -> None:
        """A connection ended, or ends now with `error`: all it waited for is cancelled."""
        if error is not None:
            stream.goodbye(error.code, str(error))
        stream.closed = True
        for request in list(stream.requests.values()):
            self._end(request, Event.CANCELLED, "cancelled", "cancelled", "connection closed")
        self._wake()

    def leave(self, stream: Stream) -> None:
        """A connection is gone."""
        self.streams.discard(stream)
        self.tracer.leave(stream)
        self.drop_stream(stream)
        self.on_left()

    def end_all(self, error: NodeServeError) -> None:
        """End every request that has not ended."""
        for request in list(self.requests.values()):
            if request.phase is not Phase.DRAINING:
                self._end(request, Event.CANCELLED, "error", error.code, str(error))

    def turn(self, earliest_s: float = 0.0) -> float | None:
        """Decide on what came, and send it on; returns when to decide again in any case.

        `earliest_s`: now, if the clock says that it is earlier.
        """
        wake_s = self.dispatch.turn(max(self._now(), earliest_s))
        self.flush()
        return wake_s

    def flush(self) -> None:
        """Send what the last records brought, one frame for each connection."""
        moved, self._moved = self._moved, {}
        for stream in moved:
            stream.flush()
        self.tracer.flush()

    def _accept(self, stream: Stream, message: Submit) -> Request:
        now = self._now()
        if self.closes_s is not None:
            words = "the server is stopping and takes no new requests"
            raise ShuttingDown(words, max(LEAST_RETRY_S, self.closes_s - now))
        if message.request_id in stream.requests:
            raise InvalidRequest(f"request_id {message.request_id} is in use on this connection")
        if stream.meter is not None:
            stream.meter.take(len(stream.requests), now)
        request = admit(message, self._next_id, stream, self.limits, now)
        try:
            self.dispatch.check(request, request.stamps.arrived)
        except Overloaded:
            self.ledger.refused(request.objective, now)
            raise
        check_vocabulary(request.tokens, self.limits.vocab_size)
        self._next_id += 1
        return request

    # ---- workers

    def handle(self, link: WorkerLink, message: FromWorker) -> None:
        """One record of a running worker. ProtocolError, before any of it is carried out, if it
        cannot be so."""
        check_holder(message, link, self.requests)
        match message:
            case StepDone():
                self._on_step(link, message)
            case KvReady():
                self._on_kv_ready(link, message.request_id, message.block_ids)
            case KvPulled():
                self._on_pulled(link, message)
            case KvRefused():
                self._on_refused(link, message)
            case Dropped():
                link.report(message.load)
                link.offered.discard(message.request_id)
                self._let_go(link, message.request_id)
            case RequestFailed():
                self._on_failed(link, message)
            case Alive():
                link.report(message.load)
                self.dispatch.on_alive(link, self._now())
            case Counted():
                self.on_counted(link, message)
                link.report(message.load)
            case _:
                raise ProtocolError(f"{type(message).__name__} from a running worker")
        self._wake()

    def _on_step(self, link: WorkerLink, step: StepDone) -> None:
        now, requests = self._now(), self.requests
        link.counters.count_step(step, now)
        received = unpack_times(step.received)
        for request_id, received_s in zip(unpack_request_ids(step.started), received, strict=True):
            if (request := requests.get(request_id)) and request.holder == link.index:
                if request.stamps.first_token is None:
                    request.stamps.start(received_s, step.began_s)
                self.tracer.started(request, received_s, step.began_s)
        link.report(step.load)
        self.tracer.ran(link, step)
        self.dispatch.on_step(link, step, now)
        self._take_logprobs(step)
        self._take_tokens(link, step, now)
        for request_id, block_ids in step.kv_ready:
            self._on_kv_ready(link, request_id, block_ids)
        for request_id in unpack_request_ids(step.preempted):
            self._on_preempted(request_id)

    def _take_logprobs(self, step: StepDone) -> None:
        if step.logprobs is None:
            return
        ids = unpack_request_ids(step.request_ids)
        for place, *entry in step.logprobs:
            if request := self.requests.get(ids[place]):
                request.logprobs.append(entry)

    def _take_tokens(self, link: WorkerLink, step: StepDone, now: float) -> None:
        """The hot loop: a dictionary look-up and an append for each token of the step."""
        requests, moved = self.requests, self._moved
        tokens = unpack_ids(step.token_ids)
        for request_id, token, finish in zip(
            unpack_request_ids(step.request_ids), tokens, step.finish, strict=True
        ):
            request = requests.get(request_id)
            if request is None or request.phase is Phase.DRAINING:
                if finish and request is not None:
                    request.on(Event.FINISHED)
                continue
            request.tokens.append(token)
            request.stamps.last_token = now
            if request.phase is Phase.PREFILL:
                self._first_token(link, request, step.began_s + step.step_s, now)
            if not request.dirty:
                request.stream.mark(request)
                moved[request.stream] = None
            if finish:
                self._end(request, Event.FINISHED, FINISH_REASONS[finish] or "", None, "")

    def _first_token(
        self, link: WorkerLink, request: Request, prefilled_s: float, now: float
    ) -> None:
        if request.stamps.first_token is None:
            request.stamps.prefilled, request.stamps.first_token = prefilled_s, now
            self.dispatch.first_token(request, now)
        request.stamps.regain(now)
        self.tracer.prefilled(request, prefilled_s, now)
        if not request.handoff:
            request.decode_worker = link.index
            request.on(Event.PREFILLED)

    def _on_kv_ready(self, link: WorkerLink, request_id: int, block_ids: bytes) -> None:
        request = self.requests.get(request_id)
        if request is None:
            return
        request.on(Event.KV_READY)
        link.offered.add(request_id)
        if request.phase is Phase.DRAINING:
            return
        request.source, request.source_blocks = link.index, block_ids
        self.setbacks.park(request)

    def _on_preempted(self, request_id: int) -> None:
        if request := self.requests.get(request_id):
            request.on(Event.PREEMPTED)
            if request.phase is Phase.WAITING:
                self.setbacks.put_back(request, "preempted")

    def _on_pulled(self, link: WorkerLink, message: KvPulled) -> None:
        link.counters.handoffs += 1
        link.counters.handoff_bytes += message.num_bytes
        link.counters.handoff_s += message.seconds
        request = self.requests.get(message.request_id)
        if request is None:
            return
        request.on(Event.KV_PULLED)
        if request.phase is Phase.DRAINING:
            return
        request.decode_worker = link.index
        self.tracer.pulled(request, message.num_bytes, message.seconds)
        request.handoff_s += message.seconds
        request.handoff_bytes += message.num_bytes
        self.setbacks.release_source(request)

    def _on_refused(self, link: WorkerLink, message: KvRefused) -> None:
        link.report(message.load)
        link.account.refused = True
        if request := self.requests.get(message.request_id):
            request.on(Event.KV_REFUSED)
            if request.phase is Phase.PARKED:
                self.setbacks.park_again(request)

    def _on_failed(self, link: WorkerLink, message: RequestFailed) -> None:
        link.report(message.load)
        request = self.requests.get(message.request_id)
        if request is None:
            return
        if request.phase is Phase.MOVING and message.code == HandoffFailed.code:
            self.setbacks.redo(request, message.message)
        else:
            self._fail(request, from_code(message.code, message.message))

    # ---- workers come and go

    def lose(self, link: WorkerLink) -> None:
        """A worker is gone: its requests go back to the window with the tokens they have."""
        link.state = LOST
        self.tracer.worker(link)
        self.dispatch.lose(link)
        for request in list(self.requests.values()):
            self.setbacks.lose(request, link)
            self._let_go(link, request.request_id)
        self._wake()

    def join(self, ranks: Sequence[WorkerLink]) -> None:
        """An instance that was lost is back, empty; `links` have its new life already."""
        for link in ranks:
            link.joining = False
            self.tracer.worker(link)
        self.dispatch.join(ranks)
        self._wake()

    # ---- ends

    def _fail(self, request: Request, error: NodeServeError) -> None:
        self._end(request, Event.FAILED, "error", error.code, str(error))

    def _end(
        self, request: Request, event: Event, reason: str, code: str | None, message: str
    ) -> None:
        """The one place where a request ends for its client."""
        if request.phase is Phase.DRAINING:
            request.on(event)
            return
        now = self._now()
        holders = self._holders(request, event)
        request.on(event)  # before anything else: it raises if the event is not legal
        if event is Event.FINISHED:
            self.dispatch.finish(request, now)
        self.dispatch.remove(request)
        timings = request.timings(now)
        outcome = self.totals.count(reason, now)
        if code != ShuttingDown.code:
            self.ledger.ended(request.ended(outcome, timings, now), now)
        self.tracer.ended(request, reason, code, now)
        self.tally.ended(request, reason, code)
        request.stream.end(request, end_of(request, reason, timings, code, message))
        if self.closes_s is not None and self.is_idle:
            self.on_idle()
        if request.phase is Phase.DONE:
            self._forget(request)
            return
        request.waiting_for = {index for index in holders if self.links[index].alive}
        for index in request.waiting_for:
            self.links[index].send(Cancel(request.request_id))
        self._finish_draining(request)

    def _holders(self, request: Request, event: Event) -> set[int]:
        """Workers to be cancelled now. A source is asked only after its reader has let go."""
        if request.phase is Phase.MOVING and event is Event.FAILED:
            return {request.source} - {-1}
        return {request.holder} if request.holder >= 0 else set()

    def _let_go(self, link: WorkerLink, request_id: int) -> None:
        """`link` holds nothing of the request any more."""
        request = self.requests.get(request_id)
        if request is None or link.index not in request.waiting_for:
            return
        request.waiting_for.discard(link.index)
        if request.source not in (-1, link.index):
            request.waiting_for.add(request.source)
            self.links[request.source].send(Cancel(request_id))
            request.source = -1
        self._finish_draining(request)

    def _finish_draining(self, request: Request) -> None:
        if not request.waiting_for:
            request.on(Event.RELEASED)
            self._forget(request)

    def _forget(self, request: Request) -> None:
        del self.requests[request.request_id]
