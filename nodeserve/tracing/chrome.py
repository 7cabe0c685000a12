"""Lanes as a trace-event file: what ui.perfetto.dev, chrome://tracing and others open.

Times are microseconds from the trace's begin, with three decimals. One group has the workers, each
with its passes and, where pages came to it, its copies; one the requests, a lane each; one what is
counted of the whole node.
"""

import gzip
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nodeserve.errors import ConfigError
from nodeserve.tracing.lanes import Lanes, Mark, RequestLane, Slice, WorkerLane
from nodeserve.wire.tracing import (
    BUFFER,
    DECODE,
    DEVICE_WAIT,
    HANDOFF,
    HANDOFF_WAIT,
    PREFILL,
    RETURN,
    TRANSIT,
)

WORKERS, NODE, REQUESTS = 1, 2, 3  # groups ("processes" in the format's words), as shown
WINDOW = 1  # the node's one lane
LANES_A_WORKER = 16  # numbers: passes, gaps, copies, and more copies that overlap those
PASSES, GAPS, COPIES = 0, 1, 2
COUNTED = {  # what the stages are counted as
    **dict.fromkeys((BUFFER,), "in the buffer"),
    **dict.fromkeys((TRANSIT, DEVICE_WAIT, PREFILL, RETURN), "in prefill"),
    **dict.fromkeys((HANDOFF_WAIT, HANDOFF), "in handoff"),
    DECODE: "in decode",
}
Json = dict[str, Any]


def write_chrome(path: Path, lanes: Lanes, about: Json) -> None:
    """As JSON, compressed if the name ends with .gz. ConfigError where it cannot be written."""
    text = json.dumps(chrome_trace(lanes, about), separators=(",", ":"))
    try:
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(text.encode(), mtime=0))
        else:
            path.write_text(text, encoding="utf-8")
    except OSError as problem:
        raise ConfigError(f"cannot write {path}: {problem.strerror}") from None


def chrome_trace(lanes: Lanes, about: Json) -> Json:
    """The whole file; `about` is shown with it."""
    clock = {"clock": "CLOCK_MONOTONIC", "began_s": lanes.began_s}
    events = [event for part in _parts(Scale(lanes.began_s), lanes) for event in part]
    return {
        "displayTimeUnit": "ms",
        "otherData": {**about, **clock},
        "traceEvents": events,
    }


def _parts(scale: "Scale", lanes: Lanes) -> Iterator[Iterable[Json]]:
    for place, (pid, name) in enumerate(
        ((NODE, "node"), (WORKERS, "workers"), (REQUESTS, "requests"))
    ):
        yield named("process", pid, 0, name, place)
    yield named("thread", NODE, WINDOW, "departures and refusals", 0)
    yield [scale.mark(mark, NODE, WINDOW) for mark in lanes.marks]
    for worker in lanes.workers.values():
        yield worker_events(scale, worker)
    for request in lanes.requests.values():
        yield request_events(scale, request)
    yield counts(scale, lanes.requests.values())


class Scale:
    """Turns seconds of the server's clock into the file's microseconds."""

    def __init__(self, began_s: float) -> None:
        self._began_s = began_s

    def us(self, at_s: float) -> float:
        return round(1e6 * (at_s - self._began_s), 3)

    def slice(self, one: Slice, pid: int, tid: int) -> Json:
        begin_us = self.us(one.begin_s)
        return {
            **{"ph": "X", "name": one.name, "pid": pid, "tid": tid},
            **{"ts": begin_us, "dur": round(self.us(one.end_s) - begin_us, 3)},
            "args": one.facts,
        }

    def mark(self, one: Mark, pid: int, tid: int) -> Json:
        return {
            **{"ph": "i", "s": "t", "name": one.name, "pid": pid, "tid": tid},
            **{"ts": self.us(one.at_s), "args": one.facts},
        }

    def count(self, name: str, value: float, at_s: float, pid: int) -> Json:
        return {
            **{"ph": "C", "name": name, "pid": pid, "ts": self.us(at_s)},
            "args": {"value": value},
        }


def named(kind: str, pid: int, tid: int, name: str, place: int) -> list[Json]:
    """What a group ("process") or a lane ("thread") is called, and where it stands."""
    ids = {"ph": "M", "pid": pid, "tid": tid, "ts": 0}
    return [
        {**ids, "name": f"{kind}_name", "args": {"name": name}},
        {**ids, "name": f"{kind}_sort_index", "args": {"sort_index": place}},
    ]


def worker_events(scale: Scale, lane: WorkerLane) -> Iterator[Json]:
    """Its passes and what happened to it, the gaps between them, copies, free blocks."""
    first = 1 + LANES_A_WORKER * lane.index
    where = "" if lane.gpu is None else f" on GPU {lane.gpu}"
    title = f"w{lane.index} {lane.role} {lane.instance}.{lane.rank}{where}"
    copies = side_by_side(lane.pulls)
    parts = [("passes", lane.passes), ("gaps", lane.gaps), *(("copies", row) for row in copies)]
    for place, (kind, slices) in enumerate(parts[:LANES_A_WORKER]):
        if place == PASSES or slices:
            yield from named("thread", WORKERS, first + place, f"{title}: {kind}", first + place)
        for one in slices:
            yield scale.slice(one, WORKERS, first + place)
    for mark in lane.marks:
        yield scale.mark(mark, WORKERS, first)
    free = -1
    for one in lane.passes:
        if (now_free := one.facts["then free blocks"]) != free:
            free = now_free
            yield scale.count(f"w{lane.index} free blocks", free, one.end_s, WORKERS)


def side_by_side(slices: Sequence[Slice]) -> list[list[Slice]]:
    """As few rows as it takes that no two slices of one overlap."""
    rows: list[list[Slice]] = []
    for one in sorted(slices, key=lambda each: each.begin_s):
        for row in rows:
            if row[-1].end_s <= one.begin_s:
                row.append(one)
                break
        else:
            rows.append([one])
    return rows


def request_events(scale: Scale, lane: RequestLane) -> Iterator[Json]:
    number = lane.number
    yield from named("thread", REQUESTS, number, title_of(lane), number)
    for one in lane.slices:
        yield scale.slice(one, REQUESTS, number)
    for mark in lane.marks:
        yield scale.mark(mark, REQUESTS, number)
    if lane.ended is not None:
        ended = lane.ended
        facts = {"code": ended.code, "output tokens": ended.output_tokens, **ended.timings}
        yield scale.mark(Mark(ended.reason, ended.at_s, facts), REQUESTS, number)


def title_of(lane: RequestLane) -> str:
    """Prompt and output tokens, as far as they are known."""
    if lane.ended is not None:
        return f"r{lane.number} {lane.ended.prompt_tokens}+{lane.ended.output_tokens}"
    if lane.arrived is not None:
        return f"r{lane.number} {lane.arrived.prompt_tokens}+?"
    return f"r{lane.number}"


def counts(scale: Scale, requests: Iterable[RequestLane]) -> Iterator[Json]:
    """How many requests were in which part of their way, whenever that changed."""
    changes: Counter[tuple[float, str]] = Counter()
    for lane in requests:
        for one in lane.slices:
            if name := COUNTED.get(one.name):
                changes[one.begin_s, name] += 1
                changes[one.end_s, name] -= 1
    now: Counter[str] = Counter()
    for (at_s, name), change in sorted(changes.items()):
        if change:
            now[name] += change
            yield scale.count(f"requests {name}", now[name], at_s, NODE)
