"""What clients that trace are told: everything adds up, and whoever is slow only harms itself."""

import random
from typing import Any

import pytest

from nodeserve.coordinator import tracer
from nodeserve.coordinator.streams import Stream
from nodeserve.errors import Overloaded
from nodeserve.tracing.lanes import Lanes, lanes_of
from nodeserve.types import Role
from nodeserve.wire.messages import Submit, pack_ids
from nodeserve.wire.tracing import DECODE, EVENTS, HANDOFF, HANDOFF_WAIT, Event
from tests.fakes.node import FakeNode, policies
from tests.fakes.trace_rules import check_request, check_workers
from tests.fakes.transport import FakeTransport
from tests.repeats import seeds

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
LAYOUTS = {"1m": [M], "1p1d": [P, D], "2p2d": [P, P, D, D], "1p1d1m": [P, D, M]}


def events_of(client: FakeTransport) -> list[Event]:
    return [EVENTS.made_of(list(parts)) for message in client.traced for parts in message.events]


def traced(node: FakeNode) -> tuple[Stream, FakeTransport]:
    """A client that traces, and does nothing else."""
    stream, client = node.connect()
    node.coordinator.tracer.turn(stream, True)
    return stream, client


def finish(node: FakeNode, stream: Stream) -> None:
    node.coordinator.tracer.turn(stream, False)
    while node.is_woken:
        node.turn()


def live(node: FakeNode, rng: random.Random, count: int, lose: bool) -> None:
    """Requests of all sizes, cancels, preemptions, a lost worker."""
    stream, _ = node.connect()
    for request_id in range(count):
        prompt = [rng.randrange(97) for _ in range(rng.randint(1, 100))]
        node.submit(stream, request_id, prompt, rng.randint(1, 60))
        for _ in range(rng.randint(0, 60)):
            node.act(rng)
        if rng.random() < 0.2 and (running := list(stream.requests.values())):
            node.coordinator.abort(rng.choice(running))
        if lose and request_id == count // 2:
            node.lose(node.workers[0])
            node.restart(0)
    node.run_to_idle(rng)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", seeds(1, 2))
@pytest.mark.parametrize("lose", [False, True], ids=["", "a worker is lost"])
async def test_lanes_of_a_random_life_add_up(layout: str, seed: int, lose: bool) -> None:
    rng = random.Random(seed)
    node = FakeNode(LAYOUTS[layout], num_blocks=20, policies=policies(max_num_seqs=5))
    stream, client = traced(node)
    live(node, rng, 40, lose)
    finish(node, stream)
    lanes = lanes_of(events_of(client))
    assert client.traced[-1].over and client.traced[-1].lost == 0
    assert sorted(lanes.requests) == list(range(1, 41))
    assert sum(check_request(lane) for lane in lanes.requests.values()) > 15
    check_workers(lanes)
    assert set(lanes.workers) == set(range(len(node.workers)))
    if lose:
        assert [mark.name for mark in lanes.workers[0].marks] == ["lost", "ready"]


async def test_preemptions_and_pulls_are_seen() -> None:
    """Some request of this life is set back and some pages move, or the test above shows less."""
    rng = random.Random(1)
    node = FakeNode([P, D, M], num_blocks=20, policies=policies(max_num_seqs=5))
    stream, client = traced(node)
    live(node, rng, 40, lose=False)
    finish(node, stream)
    lanes = lanes_of(events_of(client))
    moved = sum(ended.timings["handoff_bytes"] for ended in ends(lanes))
    pulls = [one for lane in lanes.workers.values() for one in lane.pulls]
    assert moved > 0 and sum(one.facts["bytes"] for one in pulls) == moved
    assert any(lane.marks for lane in lanes.requests.values())
    assert {mark.name.partition(" ")[0] for mark in lanes.marks} == {"departure"}


def ends(lanes: Lanes) -> list[Any]:
    return [lane.ended for lane in lanes.requests.values() if lane.ended is not None]


async def test_nothing_is_collected_while_nobody_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("an event was made for nobody")

    monkeypatch.setattr(EVENTS, "parts", never)
    node = FakeNode([P, D])
    live(node, random.Random(0), 10, lose=True)
    stream, _ = node.connect()
    node.submit(stream, 1, [], 1)  # refused
    with pytest.raises(AssertionError):
        traced(node)


async def test_requests_that_were_there_before_have_lanes_from_then_on() -> None:
    node, rng = FakeNode([P, D]), random.Random(0)
    stream, reader = node.connect()
    node.submit(stream, 1, [1, 2, 3], 30)
    while not reader.tokens.get(1):
        node.act(rng)
        node.coordinator.flush()
    began_s = node.now
    tracing, client = traced(node)
    node.run_to_idle(rng)
    finish(node, tracing)
    (lane,) = lanes_of(events_of(client)).requests.values()
    assert lane.arrived is None and lane.ended is not None
    assert {one.name for one in lane.slices} <= {HANDOFF_WAIT, HANDOFF, DECODE}
    assert all(one.begin_s >= began_s for one in lane.slices)


async def test_what_runs_when_the_trace_ends_is_cut_there() -> None:
    node, rng = FakeNode([M]), random.Random(0)
    stream, _ = node.connect()
    tracing, client = traced(node)
    node.submit(stream, 1, [1, 2, 3], 50)
    for _ in range(60):
        node.act(rng)
    finish(node, tracing)
    node.run_to_idle(rng)
    lanes = lanes_of(events_of(client))
    (lane,) = lanes.requests.values()
    assert lane.ended is None and lane.slices[-1].end_s == lanes.ended_s < node.now


async def test_a_slow_reader_loses_events_with_a_count_and_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracer, "MAX_HELD", 50)
    node = FakeNode([P, D])
    slow, slow_client = traced(node)
    quick, quick_client = traced(node)
    node.turn()
    slow.pause()
    live(node, random.Random(0), 20, lose=False)
    assert len(slow_client.traced) == 1, "only what came before"
    slow.resume()
    finish(node, slow)
    finish(node, quick)
    lost = slow_client.traced[-1].lost
    assert lost > 100 and quick_client.traced[-1].lost == 0
    assert len(events_of(slow_client)) + lost == len(events_of(quick_client))
    assert not slow.closed and slow_client.traced[-1].over


async def test_a_turn_sends_a_bounded_number_of_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a pause, when many wait."""
    monkeypatch.setattr(tracer, "MOST_A_TURN", 100)
    node = FakeNode([P, D])
    stream, client = traced(node)
    node.turn()
    stream.pause()
    live(node, random.Random(0), 40, lose=False)
    stream.resume()
    finish(node, stream)
    sizes = [len(message.events) for message in client.traced]
    assert max(sizes) == tracer.MOST_A_TURN and len(sizes) > 5
    assert [message.over for message in client.traced] == [False] * (len(sizes) - 1) + [True]


async def test_only_so_many_trace_at_once() -> None:
    node = FakeNode([M])
    streams = [traced(node)[0] for _ in range(tracer.MAX_TRACERS)]
    node.coordinator.tracer.turn(streams[0], True)  # it does already
    with pytest.raises(Overloaded, match="trace this server already"):
        traced(node)
    node.coordinator.leave(streams[0])
    finish(node, streams[1])
    assert len([traced(node), traced(node)]) == 2
    node.coordinator.tracer.turn(streams[1], False)  # it does not any more


async def test_refusals_are_told_with_their_code() -> None:
    node = FakeNode([M])
    tracing, client = traced(node)
    stream, _ = node.connect()
    node.coordinator.submit(stream, Submit(1, b"", {}, None, 0))
    node.coordinator.submit(stream, Submit(2, pack_ids([1] * 300), {}, None, 0))
    finish(node, tracing)
    marks = [mark.name for mark in lanes_of(events_of(client)).marks]
    assert marks == ["refused: invalid_request", "refused: prompt_too_long"]
