"""A trace as files: the rules of the format, lanes that are in them, rows that can be read."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from nodeserve.errors import ConfigError
from nodeserve.plan.workloads import read_trace
from nodeserve.tracing.chrome import (
    NODE,
    REQUESTS,
    WORKERS,
    chrome_trace,
    side_by_side,
    write_chrome,
)
from nodeserve.tracing.lanes import BLOCKED, BUBBLE, Lanes, Slice, lanes_of
from nodeserve.tracing.table import write_csv
from nodeserve.types import Timings
from nodeserve.wire.messages import pack_request_ids
from nodeserve.wire.tracing import (
    BUFFER,
    DECODE,
    TRANSIT,
    Arrived,
    Began,
    Ended,
    Entered,
    Event,
    Pulled,
    Ran,
    Worker,
)
from tests.fakes.node import FakeNode, policies
from tests.fakes.trace_rules import check_trace
from tests.unit.test_tracer import LAYOUTS, events_of, finish, live, traced

TIMINGS = {name: 0.0 for name in Timings.__dataclass_fields__}
BEGAN = Began(100.0, [[0, 0, 0, "prefill", None], [1, 1, 0, "decode", 3]])


def ran(step: int, began_s: float, seconds: float, **held: int) -> Ran:
    values = {"running": 0, "waiting": 0, "pinned": 0, "free_blocks": 9, **held}
    started = pack_request_ids([step])
    return Ran(0, step, began_s, seconds, 10, 0, 0, started, **values)


def lanes(*events: Event) -> Lanes:
    return lanes_of([BEGAN, *events])


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_a_file_follows_the_rules_and_has_every_lane(layout: str, tmp_path: Path) -> None:
    rng = random.Random(3)
    node = FakeNode(LAYOUTS[layout], num_blocks=20, policies=policies(max_num_seqs=5))
    stream, client = traced(node)
    live(node, rng, 40, lose=True)
    finish(node, stream)
    whole = lanes_of(events_of(client))
    for name in ("trace.json", "trace.json.gz"):
        write_chrome(tmp_path / name, whole, {"model": "fake"})
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace == json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    slices = check_trace(trace)
    assert trace["otherData"] == {"model": "fake", "clock": "CLOCK_MONOTONIC", "began_s": 0.0}
    of_requests = {tid: found for (pid, tid), found in slices.items() if pid == REQUESTS}
    assert sorted(of_requests) == sorted(n for n, lane in whole.requests.items() if lane.slices)
    total_us = sum(one["dur"] for found in of_requests.values() for one in found)
    expected_s = sum(one.seconds for lane in whole.requests.values() for one in lane.slices)
    assert total_us == pytest.approx(1e6 * expected_s)
    names = [one["name"] for (pid, _), found in slices.items() if pid == WORKERS for one in found]
    num_passes = sum(len(lane.passes) for lane in whole.workers.values())
    assert sum(name in ("prefill", "decode", "mixed", "empty") for name in names) == num_passes > 50
    assert sum(name in (BUBBLE, BLOCKED) for name in names) > 0
    counted = [event for event in trace["traceEvents"] if event["ph"] == "C"]
    last = {event["name"]: event["args"]["value"] for event in counted if event["pid"] == NODE}
    assert set(last.values()) == {0}, "nobody is anywhere in the end"
    assert all(one["args"]["value"] >= 0 for one in counted if one["pid"] == NODE)


def test_gaps_are_told_apart() -> None:
    """Nothing to do; something to do; something to do but no room for it."""
    lane = lanes(
        ran(1, 100.0, 0.5),
        ran(2, 101.0, 0.5, waiting=2, pinned=1),
        ran(3, 102.0, 0.5, waiting=2, running=1),
        ran(4, 103.0, 0.5, running=1),
        ran(5, 103.5, 0.5),
    ).workers[0]
    assert [(one.name, one.begin_s, one.end_s) for one in lane.gaps] == [
        (BLOCKED, 101.5, 102.0),
        (BUBBLE, 102.5, 103.0),
    ]
    assert lane.gaps[0].facts == {"running": 0, "waiting": 2, "pinned": 1}
    assert lane.passes[1].facts["begins"] == ["r2"]


def test_a_lost_worker_has_no_gap_until_it_is_back() -> None:
    lane = lanes(
        ran(1, 100.0, 0.5, running=1),
        Worker(100.6, 0, "lost", "was killed"),
        Worker(105.0, 0, "ready", ""),
        ran(1, 106.0, 0.5),
    ).workers[0]
    assert not lane.gaps and len(lane.passes) == 2
    assert [(mark.name, mark.facts["why"]) for mark in lane.marks] == [
        ("lost", "was killed"),
        ("ready", ""),
    ]


def test_rounding_makes_no_overlap_and_a_true_one_is_not_hidden() -> None:
    touching = lanes(ran(1, 100.0, 0.5), ran(2, 100.5 - 1e-9, 0.5))
    check_trace(chrome_trace(touching, {}))
    overlapping = chrome_trace(lanes(ran(1, 100.0, 0.5), ran(2, 100.4, 0.5)), {})
    with pytest.raises(AssertionError, match="overlaps another"):
        check_trace(overlapping)


def test_copies_that_overlap_lie_in_rows_of_their_own() -> None:
    slices = [Slice("a", 0.0, 2.0), Slice("b", 1.0, 3.0), Slice("c", 2.0, 4.0)]
    rows = side_by_side(slices)
    assert [[one.name for one in row] for row in rows] == [["a", "c"], ["b"]]
    pulls = [Pulled(101.0, 1, 1, 0, 64, 0.5), Pulled(101.2, 2, 1, 0, 64, 0.5)]
    slices_of = check_trace(chrome_trace(lanes(*pulls), {}))
    copies = [found for (pid, _), found in slices_of.items() if pid == WORKERS]
    assert [[one["name"] for one in row] for row in copies] == [["r1"], ["r2"]]


def test_times_that_run_backwards_make_no_negative_slice() -> None:
    """Between processes a turn may be dated half a millisecond ahead."""
    (lane,) = lanes(
        Arrived(101.0, 7, 5, 9, 0),
        Entered(102.0, 7, TRANSIT, 0),
        Entered(101.9, 7, "device wait", 0),
        Entered(102.5, 7, DECODE, 0),
    ).requests.values()
    assert [(one.name, one.begin_s, one.end_s) for one in lane.slices] == [
        (BUFFER, 101.0, 102.0),
        ("device wait", 102.0, 102.5),
    ]


@pytest.mark.parametrize(
    "broken",
    [
        {"ph": "X", "name": "a", "pid": 9, "tid": 1, "ts": 0, "dur": 1, "args": {}},
        {"ph": "X", "name": "a", "pid": WORKERS, "tid": 1, "ts": 0, "dur": -1, "args": {}},
        {
            "ph": "X",
            "name": "a",
            "pid": WORKERS,
            "tid": 1,
            "ts": float("nan"),
            "dur": 1,
            "args": {},
        },
        {"ph": "i", "name": "a", "pid": WORKERS, "tid": 1, "ts": 0, "s": "x", "args": {}},
        {"ph": "C", "name": "a", "pid": NODE, "ts": 0, "args": {"value": "1"}},
        {"ph": "M", "name": "process_name", "pid": NODE, "tid": 0, "ts": 0, "args": {"name": "b"}},
    ],
    ids=["no lane", "negative", "no number", "no scope", "no count", "named twice"],
)
def test_the_rules_can_be_broken(broken: dict[str, Any]) -> None:
    trace = chrome_trace(lanes(ran(1, 100.0, 0.5)), {})
    check_trace(trace)
    trace["traceEvents"].append(broken)
    with pytest.raises(AssertionError):
        check_trace(trace)


def test_rows_are_those_that_simulate_and_bench_can_ask_again(tmp_path: Path) -> None:
    timings = {**TIMINGS, "scheduler_wait_s": 0.25, "decode_s": 2.0}
    whole = lanes(
        *[Arrived(100.5 + number, number, 5 + number, 9, 0) for number in range(1, 5)],
        Ended(103.0, 1, "length", None, 6, 5, timings),
        Ended(103.0, 2, "cancelled", "cancelled", 7, 0, TIMINGS),
        Ended(104.0, 9, "stop", None, 7, 2, TIMINGS),  # it was there before
        Ended(109.0, 4, "stop", None, 9, 1, {**TIMINGS, "a later field": 1}),
    )
    path = tmp_path / "rows.csv"
    assert write_csv(path, whole) == (2, 2)
    heading, first, last = path.read_text().splitlines()
    assert heading.startswith("arrival_s,input_tokens,output_tokens,request,reason,ttft_s,tpot_s,")
    assert first.startswith("1.500000,6,5,1,length,0.250000,0.500000,0.250000,")
    assert last.startswith("4.500000,9,1,4,stop,0.000000,,0.000000,")
    asked = read_trace(path)
    assert [(one.arrived_s, one.num_prompt_tokens, one.num_output_tokens) for one in asked] == [
        (0.0, 6, 5),
        (3.0, 9, 1),
    ]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write"):
        write_chrome(tmp_path / "no" / "trace.json", lanes(), {})
    with pytest.raises(ConfigError, match="cannot write"):
        write_csv(tmp_path, lanes())
