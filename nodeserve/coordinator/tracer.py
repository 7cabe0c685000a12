"""What clients that trace are told: one call for each turning point of a request, one for a pass.

Always true: nothing is collected while nobody traces; one who reads too slowly loses events, with a
count, and slows nobody; a turn of the loop sends each of them MOST_A_TURN events at most, so that
the node is never late because it is watched.
"""

from collections.abc import Callable, Sequence

from nodeserve.coordinator.link import WorkerLink
from nodeserve.coordinator.request import Request
from nodeserve.coordinator.streams import Stream, told
from nodeserve.errors import Overloaded
from nodeserve.policy.lifecycle import Phase
from nodeserve.wire.messages import StepDone, Traced
from nodeserve.wire.tracing import (
    BUFFER,
    DECODE,
    DEVICE_WAIT,
    EVENTS,
    HANDOFF,
    HANDOFF_WAIT,
    PREFILL,
    RETURN,
    TRANSIT,
    Arrived,
    Began,
    Departed,
    Ended,
    Entered,
    Event,
    Pulled,
    Ran,
    Refused,
    SetBack,
    Worker,
)

MAX_TRACERS = 4
MAX_HELD = 1 << 14  # events for one that does not read: some 6 MB
MOST_A_TURN = 512  # events to one of them: about half a millisecond


class Tap:
    """What one client that traces has not been sent yet."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.events: list[tuple[object, ...]] = []
        self.lost = 0
        self.closing = False

    def add(self, event: tuple[object, ...]) -> None:
        if len(self.events) < MAX_HELD:
            self.events.append(event)
        else:
            self.lost += 1

    def flush(self) -> bool:
        """Send some; returns whether it has to be called again, and nothing new need happen."""
        if self.stream.paused or not (self.events or self.closing):
            return False
        part, self.events = self.events[:MOST_A_TURN], self.events[MOST_A_TURN:]
        over = self.closing and not self.events
        self.stream.send(Traced(part, self.lost, over))
        self.closing &= not over
        return bool(self.events)


class Tracer:
    """Tells all who trace. `wake` asks for another turn of the coordinator."""

    def __init__(
        self, links: Sequence[WorkerLink], now: Callable[[], float], wake: Callable[[], None]
    ) -> None:
        self._links = links
        self._now = now
        self._wake = wake
        self._taps: dict[Stream, Tap] = {}  # of those that are told what happens
        self._sending: dict[Stream, Tap] = {}  # those, and others that have not been sent all

    def turn(self, stream: Stream, on: bool) -> None:
        """Begin or end to tell this client."""
        if on:
            self._begin(stream)
        else:
            self._end(stream)

    def _begin(self, stream: Stream) -> None:
        """Tell this client from now on; Overloaded if too many are told. Nothing if this one is, or
        has not been sent all of an earlier trace."""
        if stream in self._sending:
            return
        if len(self._sending) >= MAX_TRACERS:
            raise Overloaded(f"{MAX_TRACERS} clients trace this server already: try again later")
        tap = self._taps[stream] = self._sending[stream] = Tap(stream)
        workers = [
            [link.index, link.instance, link.rank, link.role.value, link.gpu]
            for link in self._links
            if link.leads
        ]
        tap.add(EVENTS.parts(Began(self._now(), workers)))
        self._wake()

    def _end(self, stream: Stream) -> None:
        """Send what is left and tell no more; nothing if it is not told."""
        if tap := self._taps.pop(stream, None):
            tap.closing = True
            self._wake()

    def leave(self, stream: Stream) -> None:
        """It is gone."""
        self._taps.pop(stream, None)
        self._sending.pop(stream, None)

    def flush(self) -> None:
        """Send what happened in this turn, or a part of it."""
        for stream, tap in list(self._sending.items()):
            if tap.flush():
                self._wake()
            elif stream not in self._taps and not tap.closing:
                del self._sending[stream]

    def _tell(self, event: Event) -> None:
        parts = EVENTS.parts(event)
        for tap in self._taps.values():
            tap.add(parts)

    # ---- requests

    def arrived(self, request: Request) -> None:
        if self._taps:
            at_s, priority = request.stamps.arrived, request.waiting.priority
            tokens = request.num_prompt_tokens, request.max_tokens
            self._tell(Arrived(at_s, request.request_id, *tokens, priority))

    def refused(self, code: str) -> None:
        if self._taps:
            self._tell(Refused(self._now(), code))
            self._wake()

    def departed(self, instance: int, boarded: Sequence[Request], now_s: float) -> None:
        """These left the buffer together."""
        if self._taps and boarded:
            tokens = sum(len(request.tokens) for request in boarded)
            self._tell(Departed(now_s, instance, len(boarded), tokens))
            for request in boarded:
                self._enter(now_s, request, TRANSIT, request.holder)

    def started(self, request: Request, received_s: float, began_s: float) -> None:
        """Its first pass since it departed is over."""
        if self._taps:
            stamps = request.stamps
            if stamps.first_token is None:  # then these are what its timings are made of
                received_s, began_s = stamps.received or received_s, stamps.started or began_s
            self._enter(received_s, request, DEVICE_WAIT, request.holder)
            self._enter(began_s, request, PREFILL, request.holder)

    def prefilled(self, request: Request, prefilled_s: float, now_s: float) -> None:
        """A token is here that a prefill gave, its first one unless it was set back."""
        if self._taps:
            self._enter(prefilled_s, request, RETURN, request.holder)
            after = HANDOFF_WAIT if request.handoff else DECODE
            self._enter(now_s, request, after, request.holder)

    def pulls(self, request: Request, now_s: float) -> None:
        """Its holder was told to pull its pages."""
        if self._taps:
            self._enter(now_s, request, HANDOFF, request.holder)

    def pulled(self, request: Request, num_bytes: int, seconds: float) -> None:
        if self._taps:
            now_s, ids = self._now(), (request.request_id, request.holder, request.source)
            self._tell(Pulled(now_s, *ids, num_bytes, seconds))
            self._enter(now_s, request, DECODE, request.holder)

    def parked_again(self, request: Request) -> None:
        """A pull did not happen."""
        if self._taps:
            self._enter(self._now(), request, HANDOFF_WAIT, request.source)

    def set_back(self, request: Request, why: str) -> None:
        if self._taps:
            now_s = self._now()
            self._tell(SetBack(now_s, request.request_id, why))
            self._enter(now_s, request, BUFFER, -1)

    def ended(self, request: Request, reason: str, code: str | None, now_s: float) -> None:
        if self._taps:
            timings = told(request.timings(now_s))
            at_s = now_s if code is not None else request.stamps.last_token or now_s
            tokens = request.num_prompt_tokens, request.num_output_tokens
            self._tell(Ended(at_s, request.request_id, reason, code, *tokens, timings))

    def _enter(self, at_s: float, request: Request, stage: str, worker: int) -> None:
        if request.phase is not Phase.DRAINING:
            self._tell(Entered(at_s, request.request_id, stage, worker))

    # ---- workers

    def ran(self, link: WorkerLink, step: StepDone) -> None:
        """A pass is over; the load that came with it is known."""
        if self._taps:
            load = link.account.load
            self._tell(
                Ran(
                    *(link.index, step.step, step.began_s, step.step_s),
                    *(step.num_prefill_tokens, step.num_decodes, step.kv_tokens, step.started),
                    *(load.num_running, load.num_waiting, load.num_pinned, load.num_free_blocks),
                )
            )

    def worker(self, link: WorkerLink) -> None:
        """It is lost, or back. A follower is part of what its leader does."""
        if self._taps and link.leads:
            why = "" if link.alive else link.reason
            self._tell(Worker(self._now(), link.index, link.state, why))
