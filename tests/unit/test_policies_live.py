"""Requests under every policy: who may come in, and that nobody is lost, doubled or starved."""

import random
from typing import Any

import pytest

from nodeserve.errors import Overloaded
from nodeserve.policy.flow import NO_OBJECTIVE, FlowOptions, Judgement, Verdict
from nodeserve.policy.foresight import Forecast
from nodeserve.policy.units import ADMISSIONS, DECODE_ALLOCATIONS, Wait
from nodeserve.types import Role, Slo
from nodeserve.wire.messages import Submit, pack_ids
from tests.fakes.node import FakeNode, expected_stream, policies

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED

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
        slo = {"ttft_ms": 100}
        node.coordinator.submit(stream, Submit(request_id, pack_ids([1]), {}, slo, 0))
    (end,) = client.ends.pop(0)
    assert (end.code, end.message, end.retry_after_s) == (Overloaded.code, "not in time", 2.5)
    assert not client.ends and node.coordinator.totals.rejected == 1
    requests = list(node.coordinator.requests.values())
    assert [one.waiting.best_effort for one in requests] == [True, False]


async def test_flow_control_judges_by_the_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request's own SLO goes before the server's; no prediction is asked for without need."""
    node = FakeNode([M], policies=policies(max_num_queued_reqs=7, on_overload="queue"))
    stream, _ = node.connect()
    facts: list[tuple[Any, ...]] = []

    def judge(*args: Any) -> Judgement:
        facts.append(args)
        return Judgement(Verdict.ADMIT)

    monkeypatch.setattr("nodeserve.coordinator.dispatch.judge", judge)
    forecast = Forecast(Wait(0.5, 0.25), 1.0)
    monkeypatch.setattr(node.coordinator.dispatch.foresight, "forecast", lambda *about: forecast)
    node.submit(stream, 1, [1] * 9, 1)
    assert facts.pop(0)[1:] == ((0, 0), 9, NO_OBJECTIVE, None), "nothing depends on a forecast"
    node.coordinator.dispatch.policies.slo.update(ttft_ms=500.0)  # type: ignore[attr-defined]
    node.coordinator.submit(stream, Submit(4, pack_ids([1]), {}, {}, 0))
    node.coordinator.submit(stream, Submit(2, pack_ids([1]), {}, {"ttft_ms": 2000}, 0))
    node.coordinator.submit(stream, Submit(3, pack_ids([1]), {}, {"tpot_ms": 20}, 0))
    assert all(options == FlowOptions(7, 1 << 22, "queue") for options, *_ in facts)
    assert [tuple(rest) for _, *rest in facts] == [
        ((1, 9), 1, Slo(0.5), forecast),
        ((2, 10), 1, Slo(2.0), forecast),
        ((3, 11), 1, Slo(0.5, 0.02), forecast),
    ]


# ---- random lives


@pytest.mark.parametrize("allocation", DECODE_ALLOCATIONS)
@pytest.mark.parametrize("admission", ADMISSIONS)
async def test_random_lives_under_every_policy(admission: str, allocation: str) -> None:
    """Losses, returns, cancels, refusals and preemptions: each request ends once and misses no
    token."""
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
        if request_id in (30, 50):
            node.restart({30: 0, 50: 3}[request_id])
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
