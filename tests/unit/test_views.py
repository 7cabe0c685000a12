"""From answers to frames: shares of time, blocks, and the line that says what limits goodput."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from nodeserve import blame
from nodeserve.coordinator.stats import node_stats
from nodeserve.types import Role
from nodeserve.views import Frame, History, to_json
from nodeserve.views.verdict import WHY
from tests.fakes.answers import Stats, answer, span, worker
from tests.fakes.node import FakeNode, policies


def changed(stats: Stats, uptime_s: float, workers: list[Stats], **dispatch: Any) -> Stats:
    told = {**stats["dispatch"], **dispatch}
    return {**stats, "uptime_s": uptime_s, "workers": workers, "dispatch": told}


def test_rates_are_of_what_happened_between_two_answers() -> None:
    history, first = History(), answer()
    frame = history.add(first)
    assert (frame.workers[0].busy, frame.admission.departures_per_s) == (None, None)
    assert (frame.admission.fill, frame.handoff.gb_per_s) == (None, None)
    second = changed(
        first,
        104.0,
        [
            worker(0, "prefill", busy_s=1.0),
            worker(1, "decode", busy_s=9.0, handoffs=8, handoff_bytes=6 * 10**9, handoff_s=1.5),
        ],
        departures=10,
        passes={"num": 5, "seconds": 2.0, "tokens": 300, "room": 400, "balance": 4.0},
    )
    frame = history.add(second)
    assert [one.busy for one in frame.workers] == [0.25, 1.0], "steps that overlap are no more"
    admission, handoff = frame.admission, frame.handoff
    assert (admission.departures_per_s, admission.fill, admission.balance) == (2.5, 0.75, 0.8)
    assert (handoff.per_s, handoff.bytes_per_s, handoff.gb_per_s) == (2.0, 1.5e9, 4.0)


def test_answers_are_compared_over_two_seconds_however_often_one_asks() -> None:
    history = History()
    for tenth in range(60):
        busy_s = 0.01 * tenth + (1.0 if tenth >= 50 else 0.0)
        frame = history.add(answer(tenth / 10, workers=[worker(0, "mixed", busy_s=busy_s)]))
        if tenth == 49:
            assert frame.workers[0].busy == pytest.approx(0.1)
    assert frame.workers[0].busy == pytest.approx((1.0 + 0.2) / 2.0)


def test_what_a_newer_server_says_beside_is_ignored() -> None:
    """As the protocol asks of its clients: maps may get new keys."""
    newer = answer()
    goodput = newer["goodput"]
    for one in (
        *(newer, newer["health"], newer["dispatch"], *newer["workers"], goodput),
        *(goodput["series"], *goodput["spans"], *(each["tpot_ms"] for each in goodput["spans"])),
    ):
        one["news"] = {"of": [1]}
    assert History().add(newer) == History().add(answer())


@pytest.mark.parametrize("what", ["a new server", "a new life of the worker", "time goes back"])
def test_nothing_is_compared_with_another_life(what: str) -> None:
    history = History()
    history.add(answer(workers=[worker(0, "mixed", busy_s=5.0)]))
    pid, uptime_s, worker_pid = {
        "a new server": (2, 103.0, 100),
        "a new life of the worker": (1, 103.0, 7),
        "time goes back": (1, 2.0, 100),
    }[what]
    later = worker(0, "mixed", busy_s=6.0, pid=worker_pid)
    assert history.add(answer(uptime_s, pid=pid, workers=[later])).workers[0].busy is None


@pytest.mark.parametrize(
    ("free", "pinned", "expected"),
    [(100, 0, (100, 0, 0)), (30, 20, (30, 20, 50)), (-5, 20, (0, 20, 80)), (90, 20, (90, 10, 0))],
)
def test_blocks_add_up_whatever_was_promised(
    free: int, pinned: int, expected: tuple[int, int, int]
) -> None:
    one = worker(0, "prefill", free_blocks=free, pinned_blocks=pinned)
    blocks = History().add(answer(workers=[one])).workers[0].blocks
    assert (blocks.free, blocks.pinned, blocks.active) == expected
    assert blocks.free + blocks.pinned + blocks.active == blocks.total == 100


FULL = [worker(0, "prefill"), worker(4, "decode"), worker(5, "decode", free_blocks=2)]
LATE = [span(10, 50, handoff_wait=31, buffer=19), span(60, 50, buffer=50), span(300)]


def verdict(spans: list[Stats] | None = None, **values: Any) -> str:
    return History().add(answer(spans=spans, **values)).verdict


def test_the_line_names_the_reason_the_worker_and_the_share() -> None:
    assert verdict(LATE, workers=FULL) == "decode KV full on w5: 62% of misses in 10 s"
    parked = {"queued": 0, "running": 9, "parked": 7}
    words = "no decode worker takes more (7 parked): 62% of misses in 10 s"
    assert verdict(LATE, requests=parked) == words


@pytest.mark.parametrize(
    ("busy_s", "parked", "free", "words"),
    [
        (1.9, 7, 20, "prefill too slow, 9 wait in the buffer, workers 95% busy"),
        (0.4, 7, 20, "decode KV full on w1, 9 wait in the buffer"),
        (0.4, 7, 60, "no decode worker takes more (7 parked), 9 wait in the buffer"),
        (0.4, 0, 20, "9 wait in the buffer, prefill 20% busy"),
    ],
)
def test_a_buffer_that_fills_while_prefill_has_time_waits_for_decode(
    busy_s: float, parked: int, free: int, words: str
) -> None:
    history, spans = History(), [span(10, 0, buffer=20), span(60), span(300)]
    requests = {"queued": 9, "running": 9, "parked": parked}
    decode = worker(1, "decode", free_blocks=free)
    for uptime_s, so_far_s in ((100.0, 0.0), (102.0, busy_s)):
        workers = [worker(0, "prefill", busy_s=so_far_s), decode]
        frame = history.add(answer(uptime_s, spans, requests=requests, workers=workers))
    assert frame.verdict == f"{words}: 100% of misses in 10 s"


@pytest.mark.parametrize(
    ("busy_s", "words"),
    [
        (1.9, "decode steps of 20 ms on w1 (0 running)"),
        (0.2, "decode steps far apart, w1 is 10% busy, the server's loop is late by 7 ms"),
    ],
)
def test_slow_tokens_of_workers_that_hardly_compute(busy_s: float, words: str) -> None:
    history, spans = History(), [span(10, 0, decode=20), span(60), span(300)]
    for uptime_s, so_far_s in ((100.0, 0.0), (102.0, busy_s)):
        workers = [worker(0, "prefill"), worker(1, "decode", busy_s=so_far_s)]
        frame = history.add(answer(uptime_s, spans, workers=workers))
    assert frame.verdict == f"{words}: 100% of misses in 10 s"


def test_who_follows_is_not_taken_for_idle() -> None:
    """What a team computes its leader tells of: half of these two were taken for the mean."""
    history, spans = History(), [span(10, 0, buffer=20), span(60), span(300)]
    for uptime_s, busy_s in ((100.0, 0.0), (102.0, 1.9)):
        workers = [worker(0, "mixed", busy_s=busy_s), worker(1, "mixed", rank=1, leader=0)]
        frame = history.add(answer(uptime_s, spans, workers=workers))
    assert frame.verdict.startswith("prefill too slow, 0 wait in the buffer, workers 95% busy")


def test_what_is_refused_is_refused_for_a_reason() -> None:
    spans = [span(10, 0, refused=20), span(60), span(300)]
    held = {"queued": 9, "running": 9, "parked": 3}
    assert verdict(spans, workers=FULL, requests=held).startswith(
        "decode KV full on w5, more is refused: 100%"
    )
    history = History()
    for uptime_s, busy_s in ((100.0, 0.0), (102.0, 1.8)):
        workers = [worker(0, "prefill", busy_s=busy_s), worker(1, "decode")]
        frame = history.add(answer(uptime_s, spans, requests=held, workers=workers))
    assert frame.verdict.startswith("more is asked than can be in time, refused, workers 90% busy")


def test_few_requests_are_judged_over_a_longer_time() -> None:
    spans = [span(10, 0, decode=2), span(60, 4, prefill=8), span(300, 90, decode=10)]
    assert verdict(spans) == "prefill passes too long (210 ms): 100% of misses in 1 min"
    few = [span(10), span(60, 1), span(300, 2, client=1)]
    assert verdict(few) == "clients that do not read: 100% of misses in 5 min"


def test_where_most_are_in_time_nothing_limits() -> None:
    assert verdict([span(10, 20), span(60, 20), span(300, 20)]) == (
        "all 20 requests met their SLO in 10 s"
    )
    words = verdict([span(10, 95, decode=5), span(60), span(300)], workers=[worker(1, "decode")])
    assert words == (
        "95% met their SLO in 10 s; of the others 100%: decode steps of 20 ms on w1 (0 running)"
    )


def test_what_can_be_said_without_requests() -> None:
    assert verdict() == "idle"
    busy = {"queued": 0, "running": 1, "parked": 0}
    assert verdict(requests=busy) == "no request with an SLO has ended in 5 min"
    assert verdict(requests=busy, slo={}).startswith("no request had an SLO")
    health = {"state": "not ready", "reasons": ["nobody is there for decode"], "loop_lag_ms": 0.0}
    assert verdict(LATE, health=health) == "not ready: nobody is there for decode"


@pytest.mark.parametrize("workers", [[], FULL, [worker(0, "mixed", state="restarting")]])
@pytest.mark.parametrize("word", blame.WORDS)
def test_every_blame_has_words_for_every_state(word: str, workers: list[Stats]) -> None:
    assert word in WHY
    line = verdict([span(10, **{word: 20}), span(60), span(300)], workers=workers)
    assert line.endswith(": 100% of misses in 10 s") and "\n" not in line
    assert len(line) <= 100


def test_lost_workers_are_named() -> None:
    workers = [worker(0, "prefill"), worker(3, "decode", state="restarting")]
    words = verdict([span(10, 0, preemption=20), span(60), span(300)], workers=workers)
    assert words == "w3 is restarting: 100% of misses in 10 s"


async def played(play: Callable[[FakeNode], None]) -> Frame:
    """The frame of what a real coordinator says of itself."""
    node = FakeNode([Role.PREFILL, Role.DECODE], 12, policies(slo="ttft=60ms,tpot=20ms"))
    play(node)
    node.turn()
    told = node_stats(node.coordinator, node.now)
    health = {"state": "ready", "reasons": [], "loop_lag_ms": 0.0}
    about = {"model": "m", "layout": "1p1d", "pid": 1, "uptime_s": node.now, "health": health}
    return History().add({**about, **told})


async def test_a_real_answer_becomes_a_frame_that_a_page_can_read() -> None:
    def play(node: FakeNode) -> None:
        stream, _ = node.connect()
        for number in range(30):
            node.submit(stream, number, [number] * 40, 20)
            for _ in range(40):
                node.act(random.Random(number))

    frame = await played(play)
    told = json.loads(json.dumps(to_json(frame)))
    assert set(told) == set(Frame.__slots__) and told["verdict"] == frame.verdict
    assert (
        told["spans"][0]["offered"]
        == sum(told["spans"][0]["missed"].values()) + (told["spans"][0]["good"])
    )
    assert told["spans"][0]["offered"] > 0 and len(told["workers"]) == 2
