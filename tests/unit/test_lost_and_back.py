"""Instances that end and come back, with everything interleaved in every order."""

import random

import pytest

from nodeserve.policy.lifecycle import Phase
from nodeserve.types import Role
from tests.fakes.node import FakeNode, expected_stream, policies
from tests.repeats import seeds

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
LAYOUTS = {"1m": [M], "1p1d": [P, D], "2p2d": [P, P, D, D], "1p1d1m": [P, D, M]}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", seeds(3, 8))
async def test_random_deaths_and_returns_cost_no_token(layout: str, seed: int) -> None:
    """Somebody is always dying; cancels and small pools beside it."""
    rng = random.Random(f"{layout} {seed}")
    node = FakeNode(LAYOUTS[layout], num_blocks=24, policies=policies(max_num_seqs=5))
    stream, client = node.connect()
    wanted: dict[int, tuple[list[int], int]] = {}
    for request_id in range(60):
        prompt = [rng.randrange(97) for _ in range(rng.randint(1, 100))]
        wanted[request_id] = prompt, rng.randint(1, 40)
        node.submit(stream, request_id, *wanted[request_id])
        for _ in range(rng.randint(0, 60)):
            node.act(rng)
        if rng.random() < 0.1 and stream.requests:
            node.coordinator.abort(rng.choice(list(stream.requests.values())))
        if rng.random() < 0.15:
            await end_one_for_a_while(node, rng)
    node.run_to_idle(rng)
    for request_id, (prompt, max_tokens) in wanted.items():
        (end,) = client.ends[request_id]
        got = client.tokens.get(request_id, [])
        assert got == expected_stream(prompt, max_tokens)[: len(got)]
        assert end.reason == "cancelled" or end.code == "worker_lost" or len(got) == max_tokens
    node.check_nothing_held()


async def end_one_for_a_while(node: FakeNode, rng: random.Random) -> None:
    victim = rng.choice(node.workers)
    node.lose(victim)
    for _ in range(rng.randint(0, 200)):
        node.act(rng)
    node.restart(victim.link.instance)


async def test_the_next_life_hears_nothing_of_the_last_one() -> None:
    """A pull that ends after its source was started again: there is nothing to release there."""
    node, rng = FakeNode([P, D]), random.Random(0)
    stream, client = node.connect()
    node.submit(stream, 1, [5], 20)
    (request,) = node.coordinator.requests.values()
    while request.phase is not Phase.MOVING:
        node.act(rng)
    prefill, decode = node.workers
    node.lose(prefill)
    node.restart(0)
    while request.phase is Phase.MOVING:
        decode.receive(rng)
        node.deliver(decode)
    assert request.phase is Phase.DECODE
    assert node.workers[0].link.channel.inbox.num_queued == 0, "a release is for the last life"
    node.run_to_idle(rng)
    assert client.tokens[1] == expected_stream([5], 20)
    node.check_nothing_held()


@pytest.mark.parametrize("layout", ["1m", "1p1d"])
async def test_requests_wait_for_the_only_one_to_come_back(layout: str) -> None:
    node, rng = FakeNode(LAYOUTS[layout]), random.Random(1)
    stream, client = node.connect()
    for request_id in range(5):
        node.submit(stream, request_id, [request_id] * 9, 20)
    while len(client.tokens) < 3:
        node.act(rng)
    for worker in node.workers:
        node.lose(worker)
    node.submit(stream, 5, [5] * 9, 20)
    node.now += 100.0
    for _ in range(10):
        node.now += 1.0
        node.coordinator.turn()
    assert not client.ends and all(
        request.phase is Phase.WAITING for request in node.coordinator.requests.values()
    )
    for instance in range(len(node.workers)):
        node.restart(instance)
    node.run_to_idle(rng)
    for request_id in range(6):
        assert client.tokens[request_id] == expected_stream([request_id] * 9, 20)
    node.check_nothing_held()


@pytest.mark.parametrize("seed", seeds(3, 6))
@pytest.mark.parametrize("lost", [0, 1])
async def test_who_is_left_alone_does_both_until_the_other_is_back(lost: int, seed: int) -> None:
    """With requests in every phase when it happens, pages that wait for nobody among them."""
    rng, node = random.Random(seed), FakeNode([P, D], num_blocks=30)
    stream, client = node.connect()
    prompts = [[rng.randrange(97) for _ in range(rng.randint(1, 60))] for _ in range(60)]
    for request_id in range(40):
        node.submit(stream, request_id, prompts[request_id], 20)
    for _ in range(rng.randint(50, 600)):
        node.act(rng)
    node.lose(node.workers[lost])
    left = node.workers[1 - lost].link
    assert left.acting is M
    while any(request.client_id < 40 for request in node.coordinator.requests.values()):
        node.act(rng)
    node.restart(lost)
    assert left.acting is left.role
    for request_id in range(40, 60):
        node.submit(stream, request_id, prompts[request_id], 20)
    node.run_to_idle(rng)
    for request_id, prompt in enumerate(prompts):
        (end,) = client.ends[request_id]
        assert end.reason == "length" and client.tokens[request_id] == expected_stream(prompt, 20)
        if request_id >= 40:
            assert (end.timings["prefill_worker"], end.timings["decode_worker"]) == (0, 1)
    node.check_nothing_held()


async def test_what_a_stand_in_has_begun_it_finishes() -> None:
    """Prompts and decodes that it got before the other was back stay where they are."""
    node, rng = FakeNode([P, D]), random.Random(3)
    stream, client = node.connect()
    node.lose(node.workers[0])
    for request_id in range(4):
        node.submit(stream, request_id, [request_id] * 30, 40)
    while len(client.tokens) < 2:
        node.act(rng)
    node.restart(0)
    node.run_to_idle(rng)
    for request_id in range(4):
        (end,) = client.ends[request_id]
        assert (end.timings["prefill_worker"], end.timings["decode_worker"]) == (1, 1)
        assert client.tokens[request_id] == expected_stream([request_id] * 30, 40)
    node.check_nothing_held()


async def test_ranks_of_an_instance_stand_in_together() -> None:
    node, rng = FakeNode([P, D, D, D, D], instances=[0, 1, 1, 2, 2]), random.Random(4)
    stream, client = node.connect()
    node.lose(node.workers[0])
    for request_id in range(20):
        node.submit(stream, request_id, [request_id] * 9, 10)
    node.run_to_idle(rng)
    ends = [end for ends in client.ends.values() for end in ends]
    assert {end.timings["prefill_worker"] for end in ends} == {1, 2, 3, 4}
    assert all(client.tokens[one] == expected_stream([one] * 9, 10) for one in range(20))
    node.check_nothing_held()


async def test_a_layout_with_somebody_mixed_needs_no_stand_ins() -> None:
    node = FakeNode([P, D, M])
    node.lose(node.workers[0])
    assert [worker.link.acting for worker in node.workers[1:]] == [D, M]
    node.lose(node.workers[2])
    assert node.workers[1].link.acting is M
    node.restart(2)
    assert [worker.link.acting for worker in node.workers[1:]] == [D, M]
