"""Decisions carried out: which records leave, when, and what the policy is told."""

import random

import pytest

from nodeserve.coordinator.stats import node_stats
from nodeserve.policy.blocks import blocks_for
from nodeserve.policy.cost import RankWork
from nodeserve.policy.lifecycle import Phase
from nodeserve.types import Role
from nodeserve.wire.messages import (
    TO_WORKER,
    KvRefused,
    Prefill,
    Probe,
    Prompt,
    PullKv,
    RequestFailed,
    Submit,
    ToWorker,
    pack_ids,
)
from tests.fakes.node import FakeNode, FakeWorker, Told, expected_stream, policies

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED


def records(worker: FakeWorker) -> list[ToWorker]:
    """What waits in a worker's ring."""
    return [TO_WORKER.decode(record) for record in worker.link.channel.records]  # type: ignore[attr-defined]


def prompt_ids(message: ToWorker) -> list[int]:
    assert isinstance(message, Prefill)
    return [Prompt(*fields).request_id for fields in message.prompts]


async def test_a_burst_is_one_decision_and_a_departure_one_record_per_worker() -> None:
    node = FakeNode([P, P, D], policies=policies(admission="round-robin"))
    stream, _ = node.connect()
    for request_id in range(6):
        node.submit(stream, request_id, [request_id], 4)
    assert not any(records(worker) for worker in node.workers), "nobody decided yet"
    node.turn()
    assert [[prompt_ids(one) for one in records(w)] for w in node.workers] == [
        [[1, 3, 5]],
        [[2, 4, 6]],
        [],
    ]


async def test_a_departure_larger_than_a_record_is_split_in_order() -> None:
    node = FakeNode([M], policies=policies(admission="round-robin"))
    stream, client = node.connect()
    node.workers[0].link.channel.max_record_bytes = 400  # type: ignore[attr-defined]
    for request_id in range(5):
        node.submit(stream, request_id, [1] * 60, 2)  # a record of 240 bytes and something
    node.turn()
    sent = [prompt_ids(one) for one in records(node.workers[0])]
    assert sent == [[1], [2], [3], [4], [5]]
    node.run_to_idle(random.Random(0))
    assert client.tokens[4] == expected_stream([1] * 60, 2)
    node.check_nothing_held()


async def test_a_held_batch_leaves_when_its_time_comes_and_nothing_else_happens() -> None:
    """A long fixed window holds the second request, although its instance is free."""
    node, rng = FakeNode([P, P, P, D], policies=policies(window="20000")), random.Random(0)
    stream, _ = node.connect()
    node.submit(stream, 1, [5] * 100, 50)
    node.turn()
    busy = next(worker for worker in node.workers if records(worker))
    node.submit(stream, 2, [6] * 100, 50)
    node.turn()
    free = [worker for worker in node.workers if worker is not busy]
    assert not any(records(worker) for worker in free) and node.wake_s is not None
    node.now = node.wake_s - 1e-6
    node.turn()
    assert not any(records(worker) for worker in free)
    node.now = node.wake_s
    node.turn()
    assert sum(len(records(worker)) for worker in free) == 1
    node.run_to_idle(rng)


async def test_a_silent_worker_is_asked_and_its_answer_changes_nothing_else() -> None:
    node, rng = FakeNode([P, P, D]), random.Random(0)
    stream, client = node.connect()
    for request_id in range(4):  # how long a pass takes has to be known first
        node.submit(stream, request_id, [request_id], 3)
        node.run_to_idle(rng)
    node.submit(stream, 9, [3, 4], 5)
    node.turn()
    (request,) = node.coordinator.requests.values()
    silent = node.workers[request.holder]
    assert node.wake_s is not None
    node.now = node.wake_s + 10.0
    node.turn()
    assert [type(one) for one in records(silent)] == [Prefill, Probe]
    stats = node.coordinator.dispatch.dispatcher.instances
    assert [one.suspect for one in stats if one.number == silent.link.instance] == [True]
    while records(silent):
        silent.receive(rng)
    while silent.out:
        node.deliver(silent)
    assert not any(one.suspect for one in stats)
    assert request.holder == silent.link.index and request.num_losses == 0
    node.run_to_idle(rng)
    assert client.tokens[9] == expected_stream([3, 4], 5)
    node.check_nothing_held()


async def test_an_answer_that_nobody_waits_for_is_harmless() -> None:
    node, rng = FakeNode([P, D]), random.Random(0)
    stream, client = node.connect()
    node.submit(stream, 1, [3], 5)
    for worker in node.workers:
        worker.on(Probe(), rng)
        node.deliver(worker)
    node.run_to_idle(rng)
    assert client.tokens[1] == expected_stream([3], 5)
    node.check_nothing_held()


async def test_an_instance_is_heard_when_all_its_ranks_have_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node, heard = FakeNode([P, P, D], instances=[0, 0, 1]), []
    dispatch = node.coordinator.dispatch
    monkeypatch.setattr(dispatch.dispatcher, "heard", lambda one, now_s: heard.append(one))
    dispatch._probe(0)
    for worker in node.workers[:2]:
        assert not heard
        worker.receive(random.Random(0))
        node.deliver(worker)
    assert heard == [0]


async def test_the_step_of_an_instance_is_learned_once_all_ranks_have_told_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node, rng, seen = FakeNode([P, D, D], instances=[0, 1, 1]), random.Random(1), []
    monkeypatch.setattr(
        node.coordinator.dispatch.allocator, "observe", lambda ranks, s: seen.append(ranks)
    )
    stream, _ = node.connect()
    for request_id in range(6):
        node.submit(stream, request_id, [7] * 20, 8)
    node.run_to_idle(rng)
    assert seen and all(len(ranks) == 2 for ranks in seen)
    decodes = sum(work.num_decodes for ranks in seen for work in ranks)
    assert 0 < decodes <= 6 * 7
    assert all(work.kv_tokens >= 20 * work.num_decodes for ranks in seen for work in ranks)
    assert any(RankWork() in ranks for ranks in seen), "idle ranks take part"
    seen.clear()
    for index, done in ((1, 0), (1, 0), (2, 1)):  # one rank twice is not two ranks
        worker = node.workers[index]
        worker.out.clear()
        worker.out.append(Told().message(worker.load(), number=10**6, now_s=node.now))
        node.deliver(worker)
        node.turn()
        assert len(seen) == done


async def test_ranks_of_a_lost_instance_get_nothing_more() -> None:
    """The other rank is about to end as well, and is not lost yet."""
    node, rng = FakeNode([P, P, P, D, D, D], instances=[0, 0, 1, 2, 2, 3]), random.Random(0)
    stream, client = node.connect()
    node.lose(node.workers[0])
    node.lose(node.workers[3])
    for request_id in range(8):
        node.submit(stream, request_id, [request_id], 6)
    node.run_to_idle(rng)
    for request_id in range(8):
        (end,) = client.ends[request_id]
        assert (end.timings["prefill_worker"], end.timings["decode_worker"]) == (2, 5)
        assert client.tokens[request_id] == expected_stream([request_id], 6)
    node.check_nothing_held()


# ---- accounts and places in line


async def test_an_account_follows_every_answer_that_carries_a_load() -> None:
    node, rng = FakeNode([P, D]), random.Random(0)
    stream, client = node.connect()
    prefill, decode = node.workers
    assert [worker.link.account.num_blocks for worker in node.workers] == [64, 64]
    node.submit(stream, 1, [5] * 20, 9)
    node.turn()
    account = prefill.link.account
    assert (account.outstanding_tokens, account.free_blocks, account.num_sequences) == (20, 62, 1)
    prefill.num_received = 1
    prefill.out.append(RequestFailed(1, "out_of_blocks", "no", prefill.load()))
    node.deliver(prefill)
    assert (account.outstanding_tokens, account.free_blocks, account.num_sequences) == (0, 64, 0)
    assert client.ends[1][0].code == "out_of_blocks"
    prefill.link.channel.records.clear()  # type: ignore[attr-defined]
    node.submit(stream, 2, [5] * 20, 9)
    (request,) = node.coordinator.requests.values()
    while request.phase is not Phase.MOVING:
        node.act(rng)
    decode.link.channel.records.clear()  # type: ignore[attr-defined]
    decode.held.clear()
    decode.out.clear()
    decode.num_received = 1
    decode.out.append(KvRefused(2, [3, 0, 0, 40, 0, 1]))
    account = decode.link.account
    assert not account.refused
    node.deliver(decode)
    assert account.refused and (account.free_blocks, account.num_sequences) == (40, 3)
    assert request.phase is Phase.PARKED


async def test_who_comes_back_keeps_arrival_and_rounds_and_brings_its_tokens() -> None:
    node, rng = FakeNode([M, M]), random.Random(0)
    stream, _ = node.connect()
    node.now = 5.0
    node.submit(stream, 1, [5] * 30, 60)
    (request,) = node.coordinator.requests.values()
    while request.num_output_tokens < 40:
        node.act(rng)
    first, request.waiting.rounds = request.waiting, 3
    node.lose(node.workers[request.holder])
    again = request.waiting
    assert (again.num_tokens, again.num_blocks) == (len(request.tokens), 5) and len(again.hits) == 0
    assert (again.arrived_s, again.rounds) == (5.0, 3)
    assert again is not first, "what the dispatcher may still have of the first has its old size"


async def test_what_ends_by_itself_shows_how_much_requests_grow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node, rng = FakeNode([P, D]), random.Random(0)
    stream, _ = node.connect()
    grown: dict[int, int] = {}

    def forget(request_id: int, grown_blocks: int | None = None) -> None:
        if grown_blocks is not None:
            grown[request_id] = grown_blocks

    monkeypatch.setattr(node.coordinator.dispatch.allocator, "forget", forget)
    for request_id, max_tokens in ((1, 100), (2, 3), (3, 100)):
        node.submit(stream, request_id, [5] * 20, max_tokens)
    third = stream.requests[3]
    while third.num_output_tokens < 20:
        node.act(rng)
    node.coordinator.abort(third)
    node.run_to_idle(rng)
    assert grown == {1: blocks_for(121, 16) - 2, 2: 0}


async def test_the_timings_count_departures_that_left_a_request_behind() -> None:
    node, rng = FakeNode([M], policies=policies(max_num_seqs=1, admission="pull")), random.Random(0)
    stream, client = node.connect()
    for request_id in range(3):
        node.submit(stream, request_id, [1] * (30 - request_id), 2)
    node.run_to_idle(rng)
    assert [client.ends[one][0].timings["num_rounds"] for one in range(3)] == [0, 1, 2]


async def test_the_stats_tell_what_waits_and_who_is_in_doubt() -> None:
    node = FakeNode([P, D, P], policies=policies(max_num_seqs=1, decode_allocation="iqr"))
    stream, _ = node.connect()
    for request_id, priority in enumerate([0, 0, 0, 7, -1, 7]):
        node.coordinator.submit(stream, Submit(request_id, pack_ids([1]), {}, None, priority))
        node.turn()
    next(reversed(node.coordinator.requests.values())).waiting.best_effort = True
    node.lose(node.workers[2])
    stats = node_stats(node.coordinator, node.now)
    assert stats["dispatch"] == {
        **{"admission": "staggered", "decode_allocation": "iqr", "falling_back": False},
        **{"window_ms": 0.0, "pass_ms": None, "queued_tokens": 5},
        "queue": [
            {"priority": 7, "best_effort": False, "requests": 1},
            {"priority": 7, "best_effort": True, "requests": 1},
            {"priority": 0, "best_effort": False, "requests": 2},
            {"priority": -1, "best_effort": False, "requests": 1},
        ],
        "instances": [{"instance": 0, "state": "busy"}, {"instance": 2, "state": "lost"}],
        "departures": 2,
        "passes": {"num": 0, "seconds": 0.0, "tokens": 0, "room": 0, "balance": 0.0},
    }
    requests = stats["requests"]
    assert (requests["queued"], requests["running"], requests["parked"]) == (5, 1, 0)


async def test_a_pull_that_nobody_has_room_for_waits_and_goes() -> None:
    """Pages wait in prefill memory until a decode worker has blocks again."""
    node, rng = FakeNode([P, D], num_blocks=10), random.Random(0)
    stream, client = node.connect()
    for request_id in range(6):
        node.submit(stream, request_id, [request_id] * 60, 30)
    parked = 0
    while node.coordinator.requests:
        node.act(rng)
        parked = max(parked, len(node.coordinator.dispatch.parked))
        if pulls := [one for one in records(node.workers[1]) if isinstance(one, PullKv)]:
            assert len(pulls) <= 2, "ten blocks hold two prompts of four"
    assert parked >= 1
    for request_id in range(6):
        assert client.tokens[request_id] == expected_stream([request_id] * 60, 30)
    node.check_nothing_held()
