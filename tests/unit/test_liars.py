"""Workers that speak of requests that they do not have: nothing of it is carried out."""

import random
from typing import Any

import pytest

from nodeserve.errors import LifecycleError, ProtocolError
from nodeserve.policy.lifecycle import Event, Phase
from nodeserve.types import Load, Role
from nodeserve.wire.messages import (
    FromWorker,
    KvPulled,
    KvReady,
    KvRefused,
    RequestFailed,
    StepDone,
    pack_ids,
    pack_request_ids,
)
from tests.fakes.node import FakeNode, Told, expected_stream

M = Role.MIXED


LOAD = list(Load(1, 0, 0, 50, 0, 0))


def step(*ids: int, **changes: Any) -> StepDone:
    told = Told()
    for request_id in ids:
        told.add(request_id, 9, False)
    return told.message(LOAD, 1, 0.0)._replace(**changes)


def lies(own: int, others: int) -> dict[str, FromWorker]:
    """What a worker with a request of its own may say of one that it does not have."""
    load, pages = LOAD, pack_ids([1])
    return {
        "its token": step(own, others),
        "its pages": step(own, kv_ready=[[others, pages]]),
        "its preemption": step(own, preempted=pack_request_ids([others])),
        "its end": RequestFailed(others, "internal", "x", load),
        "its pages, later": KvReady(others, pages),
        "its pull": KvPulled(others, 5, 0.1),
        "its refusal": KvRefused(others, load),
    }


LIES = list(lies(1, 2))


@pytest.mark.parametrize("name", LIES)
async def test_what_another_worker_has_is_left_alone(name: str) -> None:
    node, rng = FakeNode([M, M]), random.Random(0)
    stream, client = node.connect()
    for request_id in (1, 2):
        node.submit(stream, request_id, [request_id] * 100, 5)
        node.turn()
    requests = node.coordinator.requests
    own, others = requests[1], requests[2]
    assert {own.holder, others.holder} == {0, 1}
    liar = node.workers[own.holder]
    with pytest.raises(ProtocolError, match="elsewhere"):
        node.coordinator.handle(liar.link, lies(1, 2)[name])
    assert own.num_output_tokens == 0, "not even what it might have said"
    assert others.phase is Phase.PREFILL
    node.lose(liar)
    node.run_to_idle(rng)
    for request_id in (1, 2):
        assert client.tokens[request_id] == expected_stream([request_id] * 100, 5)
    node.check_nothing_held()


@pytest.mark.parametrize("name", LIES)
async def test_what_nobody_has_yet_stays_in_the_buffer(name: str) -> None:
    node, rng = FakeNode([M]), random.Random(0)
    stream, client = node.connect()
    node.submit(stream, 1, [5], 5)
    (worker,) = node.workers
    with pytest.raises(ProtocolError, match="elsewhere"):
        node.coordinator.handle(worker.link, lies(9, 1)[name])
    node.lose(worker)
    node.restart(0)
    node.run_to_idle(rng)
    assert client.tokens[1] == expected_stream([5], 5)
    node.check_nothing_held()


async def test_an_end_that_is_not_legal_changes_nothing() -> None:
    node, rng = FakeNode([M]), random.Random(0)
    stream, client = node.connect()
    node.submit(stream, 1, [5], 5)
    (request,) = node.coordinator.requests.values()
    with pytest.raises(LifecycleError):
        node.coordinator._end(request, Event.FAILED, "error", "internal", "")
    node.run_to_idle(rng)
    assert client.tokens[1] == expected_stream([5], 5)
