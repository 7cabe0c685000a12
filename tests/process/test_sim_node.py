"""A node of simulated GPUs through its real socket: streams, handoffs, and the end of a rank."""

import os
import signal
from typing import Any

import pytest

from nodeserve.wire.messages import Abort, Stop
from tests.fakes.raw_client import RawClient
from tests.fakes.sim_worker import QUICK, expected_stream
from tests.process.conftest import Connect, Nodes
from tests.process.test_lost_workers import all_ready
from tests.process.test_node import settled

pytestmark = pytest.mark.slow

LONG = 900  # tokens: more than two seconds of passes


def prompt_of(number: int) -> list[int]:
    return [(number * 7 + place) % 97 for place in range(1 + number * 9)]


async def serve_many(client: RawClient, count: int, num_tokens: int) -> None:
    """Each of `count` requests gets its own stream and ends once."""
    for number in range(count):
        client.submit(number, prompt_of(number), max_tokens=num_tokens)
    await client.finish(*range(count))
    for number in range(count):
        assert client.tokens[number] == expected_stream(prompt_of(number), num_tokens)
        assert [end.reason for end in client.ends[number]] == ["length"]


def workers_by_instance(stats: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for worker in stats["workers"]:
        found.setdefault(worker["instance"], []).append(worker)
    return found


async def same_steps(client: RawClient) -> None:
    """Returns once all ranks of each instance have told of the same number of passes."""
    while True:
        instances = workers_by_instance(await client.stats()).values()
        told = [
            {one["steps"] for one in ranks if one["leader"] == one["index"]} for ranks in instances
        ]
        if all(len(steps) == 1 for steps in told):
            return


@pytest.mark.parametrize("layout", ["1p1d", "2m", "4p:ep2,1d:ep2"])
async def test_every_stream_is_what_it_must_be(nodes: Nodes, connect: Connect, layout: str) -> None:
    node = nodes.start(layout=layout, device="sim")
    client = await connect(node)
    await serve_many(client, 40, 12)
    stats = await settled(client)
    assert stats["layout"] == layout
    instances = workers_by_instance(stats)
    for workers in instances.values():
        assert [worker["rank"] for worker in workers] == list(range(len(workers)))
        assert len({worker["role"] for worker in workers}) == 1
    if "ep2" in layout:
        assert [len(workers) for workers in instances.values()] == [2] * 5
        await same_steps(client)
        moved = [end.timings["handoff_bytes"] for ends in client.ends.values() for end in ends]
        assert all(num_bytes >= 16 * QUICK.kv_bytes_per_token for num_bytes in moved)


async def test_a_cancelled_request_leaves_nothing_behind(nodes: Nodes, connect: Connect) -> None:
    node = nodes.start(layout="1p:ep2,1d:ep2", device="sim")
    client = await connect(node)
    for number in range(6):
        client.submit(number, prompt_of(number), max_tokens=LONG)
    await client.read_until(lambda: all(number in client.tokens for number in range(6)))
    for number in range(6):
        client.send(Abort(number))
    await client.finish(*range(6))
    assert {end.reason for ends in client.ends.values() for end in ends} == {"cancelled"}
    await settled(client)


async def test_streams_survive_preemptions(nodes: Nodes, connect: Connect) -> None:
    blocks = 16 * QUICK.kv_bytes_per_token
    node = nodes.start(layout="1m:ep2", device="sim", max_model_len=160, kv_memory=14 * blocks)
    client = await connect(node)
    for number in range(12):
        client.submit(number, prompt_of(number % 5), max_tokens=100)
    await client.finish(*range(12))
    for number in range(12):
        assert client.tokens[number] == expected_stream(prompt_of(number % 5), 100)
    preempted = [end.timings["num_preemptions"] for ends in client.ends.values() for end in ends]
    assert sum(preempted) > 0
    await settled(client)


async def test_a_killed_rank_takes_its_instance_and_no_request_with_it(
    nodes: Nodes, connect: Connect
) -> None:
    node = nodes.start(layout="2p:ep2,2d:ep2", device="sim")
    client = await connect(node)
    for number in range(16):
        client.submit(number, prompt_of(number), max_tokens=100)
    await client.read_until(lambda: all(number in client.tokens for number in range(16)))
    instances = workers_by_instance(await client.stats())
    os.kill(instances[0][1]["pid"], signal.SIGKILL)
    os.kill(instances[2][0]["pid"], signal.SIGKILL)
    for number in range(16, 32):
        client.submit(number, prompt_of(number), max_tokens=20)
    await client.finish(*range(32))
    for number in range(32):
        expected = expected_stream(prompt_of(number), 100 if number < 16 else 20)
        assert client.tokens[number] == expected
    restarts = {
        instance: [worker["restarts"] for worker in workers]
        for instance, workers in workers_by_instance(await all_ready(client)).items()
    }
    assert restarts == {0: [1, 1], 1: [0, 0], 2: [1, 1], 3: [0, 0]}, "ranks come back together"
    client = await connect(node)
    await serve_many(client, 12, 12)
    await same_steps(client)
    client.send(Stop(True))
    await client.read_to_end()
    assert node.wait() == 0


async def test_the_last_instance_takes_the_node_with_it(nodes: Nodes, connect: Connect) -> None:
    node = nodes.start(layout="1p:ep2,1d:ep2", device="sim", max_restarts=0)
    client = await connect(node)
    client.submit(1, [3], max_tokens=LONG)
    await client.read_until(lambda: 1 in client.tokens)
    instances = workers_by_instance(await client.stats())
    for ranks in instances.values():
        os.kill(ranks[1]["pid"], signal.SIGKILL)
    await client.read_to_end()
    assert [end.code for end in client.ends[1]] == ["worker_lost"]
    assert node.wait() == 1


async def test_forty_ranks_start_and_serve(nodes: Nodes, connect: Connect) -> None:
    node = nodes.start(layout="4p:ep8,1d:ep8", device="sim")
    client = await connect(node)
    assert len(node.worker_pids()) == 40
    await serve_many(client, 64, 8)
    await settled(client)
