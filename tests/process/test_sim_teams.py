"""Simulated instances whose workers follow a leader: streams, handoffs, followers that fail."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from nodeserve.policy.blocks import blocks_for
from nodeserve.wire.messages import Abort, Stop
from tests.fakes.faults import TIMEOUT_S
from tests.fakes.sim_worker import QUICK, expected_stream
from tests.process.conftest import Connect, Nodes, RunningNode, audit, names_of
from tests.process.test_lost_workers import all_ready, restarts_after
from tests.process.test_node import settled
from tests.process.test_sim_node import prompt_of, serve_many, workers_by_instance

pytestmark = pytest.mark.slow


def followers(stats: dict[str, Any]) -> list[int]:
    return [one["index"] for one in stats["workers"] if one["leader"] != one["index"]]


COUNTED = ("tokens", "prompt_tokens", "handoffs")  # once, whoever took part
LAYOUTS = {
    "1m:tp2": [1],
    "2p:tp2,2d:tp2": [1, 3, 5, 7],
    "1p:tp2.pp2,1d:tp2.pp2": [1, 2, 3, 5, 6, 7],
    "1p:tp2.ep2,1d:tp2.ep2": [1, 3, 5, 7],
    "1m:pp2.ep2": [1, 3],
    "2p:tp2,4d": [1, 3],
    "1p:ep2,1d:tp2.pp2": [3, 4, 5],
}


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_a_team_serves_as_one(nodes: Nodes, connect: Connect, layout: str) -> None:
    node = nodes.start(layout=layout, device="sim")
    assert not names_of(node.pid), "no name is left once everybody has mapped everything"
    client = await connect(node)
    await serve_many(client, 20, 12)
    if "p:" in layout:  # all of a request's pages came over, each part of them once
        for number in range(20):
            num_bytes = client.ends[number][0].timings["handoff_bytes"]
            num_tokens = 16 * blocks_for(len(prompt_of(number)), 16)
            assert num_bytes == num_tokens * QUICK.kv_bytes_per_token
    stats = await settled(client)
    assert followers(stats) == LAYOUTS[layout]
    counted = {name: sum(one[name] for one in stats["workers"]) for name in COUNTED}
    assert counted == {
        "tokens": 20 * 12,
        "prompt_tokens": sum(len(prompt_of(number)) for number in range(20)),
        "handoffs": 20 * ("p" in layout.split(":")[0]),
    }
    for worker in stats["workers"]:
        follows = worker["index"] in LAYOUTS[layout]
        assert worker["state"] == "ready" and bool(worker["steps"]) is not follows
        assert bool(worker["num_blocks"]) is not follows
    client.submit(100, [1, 2, 3], max_tokens=900)
    await client.read_until(lambda: 100 in client.tokens)
    client.send(Abort(100))
    await client.finish(100)
    await settled(client)
    client.send(Stop(True))
    await client.read_to_end()
    assert node.wait() == 0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Nodes, RunningNode]]:
    """Two teams, whose followers fail one after the other."""
    nodes = Nodes(tmp_path_factory.mktemp("teams"))
    settings = {"step_timeout": TIMEOUT_S, "restart_delay": 0.0, "max_restarts": 1000}
    try:
        yield nodes, nodes.start(layout="1p:tp2,1d:tp2", device="sim", **settings)
    finally:
        nodes.end()


@pytest.mark.parametrize("fault", ["kill", "stop", "hang", "exception", "torn"])
@pytest.mark.parametrize("victim", [1, 3])
async def test_a_follower_that_fails_in_a_step_costs_no_token(
    pair: tuple[Nodes, RunningNode], connect: Connect, fault: str, victim: int
) -> None:
    """Worker 1 follows a prefill leader, worker 3 one that decodes."""
    nodes, node = pair
    client = await connect(node)
    before = await restarts_after(client)
    for number in range(6):
        client.submit(number, prompt_of(number), max_tokens=60)
    if victim == 3:
        await client.read_until(lambda: len(client.tokens) == 6)
    order = nodes.order(fault, victim, "follow")
    for number in range(6, 9):
        client.submit(number, prompt_of(number), max_tokens=60)
    await client.finish(*range(9))
    for number in range(9):
        assert client.tokens[number] == expected_stream(prompt_of(number), 60)
        assert [end.reason for end in client.ends[number]] == ["length"]
    assert not order.exists()
    lost = victim // 2
    wanted = [was + (i // 2 == lost) for i, was in enumerate(before)]
    assert await restarts_after(client, sum(wanted)) == wanted
    await settled(client)
    assert not audit(node)


async def test_who_follows_a_killed_leader_goes_with_it(nodes: Nodes, connect: Connect) -> None:
    node = nodes.start(layout="2m:tp2", device="sim", restart_delay=0.0)
    client = await connect(node)
    for number in range(8):
        client.submit(number, prompt_of(number), max_tokens=60)
    await client.read_until(lambda: len(client.tokens) == 8)
    instances = workers_by_instance(await client.stats())
    before = [worker["pid"] for worker in instances[0]]
    os.kill(before[0], signal.SIGKILL)
    await client.finish(*range(8))
    for number in range(8):
        assert client.tokens[number] == expected_stream(prompt_of(number), 60)
    after = workers_by_instance(await all_ready(client, restarts=2))[0]
    assert not {worker["pid"] for worker in after} & set(before)
