"""Decisions carried out: which records leave, when, and what the policy is told."""

import random
from typing import Any

import pytest

from nodeserve.config import EngineConfig
from nodeserve.coordinator.policies import Policies, policies_of
from nodeserve.coordinator.stats import node_stats
from nodeserve.errors import Overloaded
from nodeserve.policy.cost import RankWork
from nodeserve.policy.flow import FlowOptions, Judgement, Verdict
from nodeserve.policy.units import ADMISSIONS, DECODE_ALLOCATIONS
from nodeserve.types import Role
from nodeserve.wire.messages import (
    TO_WORKER,
    Prefill,
    Probe,
    Prompt,
    PullKv,
    Submit,
    ToWorker,
    pack_ids,
)
from tests.fakes.node import FakeNode, FakeWorker, expected_stream

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED


def policies(max_num_seqs: int = 8, **settings: Any) -> Policies:
    return policies_of(EngineConfig(**settings), max_num_seqs, 128)


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


# ---- flow control


async def test_what_flow_control_says_reaches_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    node = FakeNode([M])
    stream, client = node.connect()
    said = [
        Judgement(Verdict.REJECT, 2.5, "not in time"),
        Judgement(Verdict.BEST_EFFORT),
        Judgement(Verdict.ADMIT),
    ]
    monkeypatch.setattr("nodeserve.coordinator.dispatch.judge", lambda *facts: said.pop(0))
    for request_id in range(3):
        node.submit(stream, request_id, [1], 1)
    (end,) = client.ends.pop(0)
    assert (end.code, end.message, end.retry_after_s) == (Overloaded.code, "not in time", 2.5)
    assert not client.ends and node.coordinator.totals.rejected == 1
    requests = list(node.coordinator.requests.values())
    assert [one.waiting.best_effort for one in requests] == [True, False]


async def test_flow_control_judges_by_the_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request's own SLO goes before the server's; no prediction is asked for without need."""
    node = FakeNode([M], policies=policies(max_num_queued_reqs=7, on_overload="queue"))
    node.coordinator.dispatch.policies.slo.update(ttft_ms=500.0)  # type: ignore[attr-defined]
    stream, _ = node.connect()
    facts: list[tuple[Any, ...]] = []

    def judge(*args: Any) -> Judgement:
        facts.append(args)
        return Judgement(Verdict.ADMIT)

    monkeypatch.setattr("nodeserve.coordinator.dispatch.judge", judge)
    monkeypatch.setattr(
        node.coordinator.dispatch.dispatcher, "predict_wait_s", lambda waiting, now_s: 0.75
    )
    node.submit(stream, 1, [1] * 9, 1)
    node.coordinator.submit(stream, Submit(2, pack_ids([1]), {}, {"ttft_ms": 2000}, 0))
    node.coordinator.submit(stream, Submit(3, pack_ids([1]), {}, {"tpot_ms": 20}, 0))
    assert all(options == FlowOptions(7, 1 << 22, "queue") for options, *_ in facts)
    assert [tuple(rest) for _, *rest in facts] == [
        ((0, 0), 9, 0.5, 0.75),
        ((1, 9), 1, 2.0, 0.75),
        ((2, 10), 1, 0.5, 0.75),
    ]


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
    }
    requests = stats["requests"]
    assert (requests["queued"], requests["running"], requests["parked"]) == (5, 1, 0)


# ---- random lives


@pytest.mark.parametrize("allocation", DECODE_ALLOCATIONS)
@pytest.mark.parametrize("admission", ADMISSIONS)
async def test_random_lives_under_every_policy(admission: str, allocation: str) -> None:
    """Losses, cancels, refusals and preemptions: each request ends once and misses no token."""
    rng = random.Random(f"{admission} {allocation}")
    chosen = policies(max_num_seqs=5, admission=admission, decode_allocation=allocation)
    roles, instances = [P, P, P, D, D, D, M], [0, 0, 1, 2, 3, 3, 4]
    node = FakeNode(roles, num_blocks=24, policies=chosen, instances=instances)
    stream, client = node.connect()
    wanted: dict[int, tuple[list[int], int]] = {}
    for request_id in range(60):
        prompt = [rng.randrange(97) for _ in range(rng.randint(1, 100))]
        wanted[request_id] = prompt, rng.randint(1, 40)
        sampling = {"max_tokens": wanted[request_id][1], "temperature": 0.0}
        message = Submit(request_id, pack_ids(prompt), sampling, None, rng.randint(-1, 1))
        node.coordinator.submit(stream, message)
        for _ in range(rng.randint(0, 60)):
            node.act(rng)
        if rng.random() < 0.15 and stream.requests:
            node.coordinator.abort(rng.choice(list(stream.requests.values())))
        if request_id in (20, 40):
            instance = {20: 0, 40: 3}[request_id]
            for worker in node.workers:
                if worker.link.instance == instance:
                    node.lose(worker)
                    for _ in range(rng.randint(0, 30)):
                        node.act(rng)
    node.run_to_idle(rng)
    for request_id, (prompt, max_tokens) in wanted.items():
        (end,) = client.ends[request_id]
        got = client.tokens.get(request_id, [])
        assert got == expected_stream(prompt, max_tokens)[: len(got)]
        assert end.reason == "cancelled" or len(got) == max_tokens
    node.check_nothing_held()


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
