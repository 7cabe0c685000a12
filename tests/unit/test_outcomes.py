"""What the coordinator counts of requests that end: in every way that one can."""

import random
from typing import Any

import pytest

from nodeserve.coordinator.stats import node_stats
from nodeserve.coordinator.streams import Stream
from nodeserve.errors import NodeServeError, ShuttingDown, WorkerLost
from nodeserve.types import Role, Timings
from nodeserve.wire.messages import Submit, pack_ids
from tests.fakes.node import FakeNode, policies

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
EASY = {"ttft_ms": 1000, "tpot_ms": 500}


def submit(
    node: FakeNode, stream: Stream, request_id: int, num_tokens: int = 20, **slo: float
) -> None:
    sampling = {"max_tokens": num_tokens, "temperature": 0.0}
    limits = {**EASY, **slo}
    node.coordinator.submit(stream, Submit(request_id, pack_ids([1, 2]), sampling, limits, 0))


def until_tokens(node: FakeNode, rng: random.Random, num_tokens: int) -> None:
    """Until every request has so many."""
    while any(one.num_output_tokens < num_tokens for one in node.coordinator.requests.values()):
        node.act(rng)


def total(node: FakeNode) -> dict[str, Any]:
    told: dict[str, Any] = node.coordinator.ledger.stats(node.now)["total"]
    return told


@pytest.mark.parametrize("roles", [[M], [P, D]])
async def test_time_that_a_lost_worker_took_is_to_blame(roles: list[Role]) -> None:
    node, rng = FakeNode(roles), random.Random(1)
    stream, client = node.connect()
    submit(node, stream, 1)
    until_tokens(node, rng, 5)
    lost = node.workers[-1]
    node.lose(lost)
    node.now += 20.0
    node.restart(lost.link.instance)
    node.run_to_idle(rng)
    timings = Timings(**client.ends[1][0].timings)
    assert 20.0 <= timings.lost_after_s <= timings.decode_s and timings.lost_before_s == 0.0
    assert total(node) == {"offered": 1, "good": 0, "missed": {"preemption": 1}}


async def test_what_was_computed_for_nothing_before_the_first_token_as_well() -> None:
    node, rng = FakeNode([M]), random.Random(1)
    stream, client = node.connect()
    submit(node, stream, 1)
    node.turn()
    node.now += 5.0
    node.lose(node.workers[0])
    node.restart(0)
    node.run_to_idle(rng)
    timings = Timings(**client.ends[1][0].timings)
    assert timings.lost_before_s == 5.0 <= timings.scheduler_wait_s and timings.lost_after_s == 0.0
    assert total(node)["missed"] == {"preemption": 1}


@pytest.mark.parametrize("resumes", [True, False])
async def test_who_does_not_read_is_late_by_itself(resumes: bool) -> None:
    """The server had the first token in time. One that reads soon enough misses nothing."""
    node, rng = FakeNode([M]), random.Random(2)
    (slow, _), (fast, _) = node.connect(), node.connect()
    slow.pause()
    submit(node, slow, 1, ttft_ms=500)
    submit(node, fast, 1, ttft_ms=500)
    until_tokens(node, rng, 1)
    node.turn()
    node.now += 0.7
    if resumes:
        slow.resume()
    node.run_to_idle(rng)
    assert total(node) == {"offered": 2, "good": 1, "missed": {"client": 1}}


async def test_a_reader_that_was_away_for_a_moment_is_good() -> None:
    node, rng = FakeNode([M]), random.Random(2)
    stream, _ = node.connect()
    stream.pause()
    submit(node, stream, 1, ttft_ms=500)
    until_tokens(node, rng, 1)
    node.turn()
    stream.resume()
    node.now += 0.7
    node.run_to_idle(rng)
    assert total(node)["good"] == 1


@pytest.mark.parametrize(
    ("error", "missed"), [(WorkerLost("all"), {"failed": 3}), (ShuttingDown("asked to"), {})]
)
async def test_a_stop_is_nobodys_miss(error: NodeServeError, missed: dict[str, int]) -> None:
    node, rng = FakeNode([P, D]), random.Random(3)
    stream, _ = node.connect()
    for number in range(3):
        submit(node, stream, number)
    until_tokens(node, rng, 1)
    node.coordinator.end_all(error)
    assert total(node)["missed"] == missed and total(node)["good"] == 0


async def test_refused_ones_count_if_it_was_for_their_limits_or_for_room() -> None:
    node, rng = FakeNode([P, D], policies=policies(max_num_queued_reqs=2)), random.Random(4)
    stream, client = node.connect()
    for number in range(8):
        submit(node, stream, number)
    node.coordinator.submit(stream, Submit(9, pack_ids([1]), {}, None, 0))
    node.coordinator.submit(stream, Submit(10, pack_ids([]), {}, dict(EASY), 0))
    refused = [one for one, ends in client.ends.items() if ends[0].code == "overloaded"]
    assert refused == [2, 3, 4, 5, 6, 7, 9] and client.ends[10][0].code == "invalid_request"
    node.run_to_idle(rng)
    assert total(node) == {"offered": 8, "good": 2, "missed": {"refused": 6}}


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_happens_each_is_counted_once(seed: int) -> None:
    rng = random.Random(seed)
    node = FakeNode([P, D, M], num_blocks=20)
    stream, client = node.connect()
    for number in range(60):
        submit(node, stream, number, rng.randrange(1, 60), ttft_ms=40, tpot_ms=10)
        for _ in range(rng.randrange(60)):
            node.act(rng)
        if rng.random() < 0.1 and (open_now := list(stream.requests.values())):
            node.coordinator.abort(rng.choice(open_now))
        if rng.random() < 0.05 and not any(one.lost for one in node.workers):
            node.lose(rng.choice(node.workers))
        elif rng.random() < 0.3:
            for one in [one for one in node.workers if one.lost]:
                node.restart(one.link.instance)
    node.run_to_idle(rng)
    ends = [end for ends in client.ends.values() for end in ends]
    finished = [end for end in ends if end.reason == "length"]
    good = sum(is_good(end.timings, end.usage["completion_tokens"]) for end in finished)
    told = total(node)
    assert told["good"] == good and told["offered"] == good + sum(told["missed"].values())
    late = sum(end.reason == "cancelled" and end.timings["scheduler_wait_s"] > 0.04 for end in ends)
    others = [end for end in ends if end.reason == "error"]
    assert len(finished) + len(others) + late <= told["offered"] <= len(ends)
    assert told["missed"].get("refused", 0) == sum(end.code == "overloaded" for end in others)
    assert told["missed"].get("failed", 0) == sum(end.code == "worker_lost" for end in others)


def is_good(timings: dict[str, Any], num_tokens: int) -> bool:
    told = Timings(**timings)
    in_time = told.ttft_s <= 0.040
    return in_time and (num_tokens < 2 or told.decode_s / (num_tokens - 1) <= 0.010)


async def test_blocks_that_wait_for_a_decode_worker_are_told_apart() -> None:
    """Two of ten prompts of four blocks have room to decode; the pages of others stay pinned."""
    node, rng = FakeNode([P, D], num_blocks=10), random.Random(0)
    stream, _ = node.connect()
    pinned: set[int] = set()
    for number in range(6):
        sampling = {"max_tokens": 30, "temperature": 0.0}
        submitted = Submit(number, pack_ids([number] * 60), sampling, None, 0)
        node.coordinator.submit(stream, submitted)
    while node.coordinator.requests:
        node.act(rng)
        stats = node_stats(node.coordinator, node.now)
        prefill, decode = stats["workers"]
        waiting = stats["requests"]["parked"]
        assert decode["pinned_blocks"] == 0 and prefill["pinned_blocks"] >= waiting
        pinned.add(prefill["pinned_blocks"])
    assert pinned == {0, 1, 2}, "a fake worker says one block for each"
    assert stats["workers"][0]["pinned_blocks"] == 0
