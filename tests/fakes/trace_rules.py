"""What the trace-event format demands of a file, and viewers silently forgive or drop otherwise.

Strict on purpose: every lane has a name, nothing has a negative time or length, slices of one lane
are either apart or one within the other. And what must be true of lanes before they are written.
"""

import math
from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest

from nodeserve.tracing.lanes import Lanes, RequestLane
from nodeserve.types import Timings
from nodeserve.wire.tracing import DECODE, HANDOFF, HANDOFF_WAIT, STAGES

METADATA = {
    "process_name": ("name", str),
    "thread_name": ("name", str),
    "process_sort_index": ("sort_index", int),
    "thread_sort_index": ("sort_index", int),
}
FIELDS = {
    "M": {"ph", "name", "pid", "tid", "ts", "args"},
    "X": {"ph", "name", "pid", "tid", "ts", "dur", "args"},
    "i": {"ph", "name", "pid", "tid", "ts", "s", "args"},
    "C": {"ph", "name", "pid", "ts", "args"},
}
Lane = tuple[int, int]
AFTER_FIRST = (HANDOFF_WAIT, HANDOFF, DECODE)


def check_trace(trace: dict[str, Any]) -> dict[Lane, list[dict[str, Any]]]:
    """AssertionError for anything against the format; the slices of each lane, by time."""
    assert trace["displayTimeUnit"] in ("ms", "ns")
    assert isinstance(trace["otherData"], dict) and isinstance(trace["traceEvents"], list)
    lanes: dict[Lane, list[dict[str, Any]]] = defaultdict(list)
    used: set[Lane] = set()
    names: dict[tuple[str, Any], str] = {}
    for event in trace["traceEvents"]:
        kind = event["ph"]
        assert set(event) == FIELDS[kind], event
        assert isinstance(event["name"], str) and event["name"]
        assert type(event["pid"]) is int and type(event.get("tid", 0)) is int
        assert math.isfinite(event["ts"])
        assert isinstance(event["args"], dict)
        lane = event["pid"], event.get("tid", 0)
        if kind == "M":
            key, value_type = METADATA[event["name"]]
            assert list(event["args"]) == [key] and type(event["args"][key]) is value_type
            if key == "name":
                where = event["name"], lane if event["name"] == "thread_name" else event["pid"]
                assert where not in names, f"{where} has two names"
                names[where] = event["args"][key]
        else:
            used.add(lane)
        if kind == "X":
            assert event["dur"] >= 0 and math.isfinite(event["dur"])
            lanes[lane].append(event)
        elif kind == "i":
            assert event["s"] in ("t", "p", "g")
        elif kind == "C":
            assert event["args"] and all(
                type(value) in (int, float) and math.isfinite(value)
                for value in event["args"].values()
            )
    for pid, tid in used:
        assert ("process_name", pid) in names
        assert not tid or ("thread_name", (pid, tid)) in names
    for slices in lanes.values():
        slices.sort(key=lambda one: (one["ts"], -one["dur"]))
        check_nesting(slices)
    return lanes


def check_nesting(slices: list[dict[str, Any]]) -> None:
    """They begin in this order; each is over before the next one, or around it."""
    open_until: list[float] = []
    for one in slices:
        begin, end = one["ts"], one["ts"] + one["dur"]
        while open_until and open_until[-1] <= begin + 5e-4:  # half of the last decimal
            open_until.pop()
        assert not open_until or end <= open_until[-1] + 5e-4, f"{one} overlaps another"
        open_until.append(end)


def stages_of(lane: RequestLane) -> dict[str, float]:
    found = dict.fromkeys(STAGES, 0.0)
    for one in lane.slices:
        found[one.name] += one.seconds
    return found


def check_request(lane: RequestLane) -> bool:
    """Contiguous from arrival to end, and what its timings say; returns whether it had a token."""
    assert lane.arrived is not None and lane.ended is not None
    edges = [lane.arrived.at_s, *(one.end_s for one in lane.slices)]
    assert edges[:-1] == [one.begin_s for one in lane.slices], "a hole or an overlap"
    assert edges[-1] == lane.ended.at_s
    timings = Timings(**lane.ended.timings)
    if lane.ended.code is not None or not lane.ended.output_tokens:
        return False
    stages = stages_of(lane)
    total_s = lane.ended.at_s - lane.arrived.at_s
    assert total_s == pytest.approx(timings.ttft_s + timings.decode_s)
    if not lane.marks:  # it was never set back
        first_five = [stages[name] for name in STAGES[:5]]
        assert first_five == pytest.approx(
            [timings.scheduler_wait_s, timings.transit_s, timings.device_wait_s]
            + [timings.prefill_s, timings.return_s]
        )
        assert sum(stages[name] for name in AFTER_FIRST) == pytest.approx(timings.decode_s)
        assert stages[HANDOFF] >= timings.handoff_s - 1e-6, "the copy is within it"
        assert stages[HANDOFF_WAIT] >= timings.handoff_wait_s - 1e-6
    assert len(lane.marks) == timings.num_preemptions
    return True


def check_workers(lanes: Lanes) -> None:
    for lane in lanes.workers.values():
        both = sorted([*lane.passes, *lane.gaps], key=lambda one: one.begin_s)
        assert all(a.end_s <= b.begin_s for a, b in pairwise(lane.passes)), "passes overlap"
        assert all(a.end_s <= b.begin_s + 1e-12 for a, b in pairwise(both))
