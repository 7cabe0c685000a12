"""From a trace's events to lanes: who ran what from when to when, and where each request was.

Always true: the slices of a request follow each other without a gap, from its arrival (or the first
that was heard of it) to its end; a worker's passes, and its gaps, do not overlap. Times are seconds
of the server's monotonic clock.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nodeserve.wire.messages import unpack_request_ids
from nodeserve.wire.tracing import (
    BUFFER,
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

LEAST_GAP_S = 1e-4  # between two passes, for it to be called one
ROUNDING_S = 1e-6  # by which the end of a pass may be after the next one's beginning
BUBBLE, BLOCKED = "bubble", "blocked by pinned pages"


@dataclass(frozen=True, slots=True)
class Slice:
    """What went on for some time, and what is to be said of it."""

    name: str
    begin_s: float
    end_s: float
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.end_s - self.begin_s


@dataclass(frozen=True, slots=True)
class Mark:
    """What happened at one time."""

    name: str
    at_s: float
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class RequestLane:
    """One request. `arrived` None: it was there before the trace; `ended` None: it still was after
    it, or its end was lost."""

    number: int
    arrived: Arrived | None = None
    ended: Ended | None = None
    slices: list[Slice] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)


@dataclass(slots=True)
class WorkerLane:
    """One worker, over all its lives within the trace. `pulls` are copies into its pages."""

    index: int
    instance: int
    rank: int
    role: str
    gpu: int | None
    passes: list[Slice] = field(default_factory=list)
    gaps: list[Slice] = field(default_factory=list)
    pulls: list[Slice] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)


@dataclass(slots=True)
class Lanes:
    """A whole trace. `marks` are of the node: departures and refusals."""

    began_s: float = 0.0
    ended_s: float = 0.0
    workers: dict[int, WorkerLane] = field(default_factory=dict)
    requests: dict[int, RequestLane] = field(default_factory=dict)
    marks: list[Mark] = field(default_factory=list)


def lanes_of(events: Iterable[Event]) -> Lanes:
    """Lay out all of a trace's events, in the order in which they came."""
    return _Layout().lay(events)


class _Path:
    """A request on its way through the stages."""

    def __init__(self, lane: RequestLane) -> None:
        self.lane = lane
        self._stage: str | None = None
        self._worker = -1
        self._since_s = -math.inf

    def enter(self, stage: str | None, worker: int, at_s: float) -> None:
        """Leave the stage before; None: for nothing. Times may be a little out of order, for they
        are of different processes."""
        if (stage, worker) == (self._stage, self._worker):
            return
        at_s = max(at_s, self._since_s)
        if self._stage is not None and at_s > self._since_s:
            facts = {} if self._worker < 0 else {"worker": self._worker}
            self.lane.slices.append(Slice(self._stage, self._since_s, at_s, facts))
        self._stage, self._worker, self._since_s = stage, worker, at_s


class _Layout:
    """Takes events one by one."""

    def __init__(self) -> None:
        self._lanes = Lanes()
        self._paths: dict[int, _Path] = {}
        self._last: dict[int, Ran] = {}  # of each worker

    def lay(self, events: Iterable[Event]) -> Lanes:
        for event in events:
            self._take(event)
        lanes = self._lanes
        for path in self._paths.values():
            if path.lane.ended is None:
                path.enter(None, -1, lanes.ended_s)
        return lanes

    def _take(self, event: Event) -> None:
        lanes = self._lanes
        at_s = event.began_s + event.seconds if isinstance(event, Ran) else event.at_s
        lanes.ended_s = max(lanes.ended_s, at_s)
        match event:
            case Began():
                lanes.began_s = at_s
                rows = [WorkerLane(*row) for row in event.workers]
                lanes.workers = {row.index: row for row in rows}
            case Ran():
                self._ran(event)
            case Worker():
                if lane := lanes.workers.get(event.worker):
                    lane.marks.append(Mark(event.state, at_s, {"why": event.why}))
                    self._last.pop(event.worker, None)
            case Departed():
                facts = {"requests": event.requests, "prompt tokens": event.tokens}
                lanes.marks.append(Mark(f"departure to instance {event.instance}", at_s, facts))
            case Refused():
                lanes.marks.append(Mark(f"refused: {event.code}", at_s))
            case _:
                self._request(event)

    def _request(self, event: Arrived | Entered | Pulled | SetBack | Ended) -> None:
        path = self._paths.get(event.request)
        if path is None:
            lane = self._lanes.requests[event.request] = RequestLane(event.request)
            path = self._paths[event.request] = _Path(lane)
        at_s = event.at_s
        match event:
            case Arrived():
                path.lane.arrived = event
                path.enter(BUFFER, -1, at_s)
            case Entered():
                path.enter(event.stage, event.worker, at_s)
            case SetBack():
                path.lane.marks.append(Mark(event.why, at_s))
            case Pulled():
                self._pulled(event)
            case Ended():
                path.lane.ended = event
                path.enter(None, -1, at_s)

    def _pulled(self, event: Pulled) -> None:
        """The worker says how long it copied, not when: until just before it said so."""
        if lane := self._lanes.workers.get(event.worker):
            facts = {"from worker": event.source, "bytes": event.num_bytes}
            begin_s = event.at_s - event.seconds
            lane.pulls.append(Slice(f"r{event.request}", begin_s, event.at_s, facts))

    def _ran(self, event: Ran) -> None:
        lane = self._lanes.workers.get(event.worker)
        if lane is None:
            return
        begin_s, end_s = event.began_s, event.began_s + event.seconds
        last, self._last[event.worker] = self._last.get(event.worker), event
        if last is not None:
            before_s = lane.passes[-1].end_s
            if before_s - ROUNDING_S < begin_s < before_s:
                begin_s = before_s
            if begin_s - before_s >= LEAST_GAP_S and (name := kind_of_gap(last)):
                held = {"running": last.running, "waiting": last.waiting, "pinned": last.pinned}
                lane.gaps.append(Slice(name, before_s, begin_s, held))
        lane.passes.append(Slice(kind_of_pass(event), begin_s, end_s, composition(event)))


def kind_of_pass(ran: Ran) -> str:
    """By what was in it: interference is a mixed one."""
    if ran.prefill_tokens:
        return "mixed" if ran.decodes else "prefill"
    return "decode" if ran.decodes else "empty"


def kind_of_gap(ran: Ran) -> str:
    """Why a worker may have stood still after this pass; empty: it had nothing to do."""
    if not ran.running + ran.waiting:
        return ""
    return BLOCKED if ran.pinned and not ran.running else BUBBLE


def composition(ran: Ran) -> dict[str, Any]:
    """A pass's batch, and what its worker held afterwards."""
    return {
        "step": ran.step,
        "prompt tokens": ran.prefill_tokens,
        "decode rows": ran.decodes,
        "context tokens": ran.kv_tokens,
        "begins": [f"r{number}" for number in unpack_request_ids(ran.started)],
        "then running": ran.running,
        "then waiting": ran.waiting,
        "then pinned": ran.pinned,
        "then free blocks": ran.free_blocks,
    }
