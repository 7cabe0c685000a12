"""Workers that end: the others go on, their requests do too, and they come back."""

import os
import signal
from typing import Any

import pytest

from tests.fakes.model import expected_stream
from tests.fakes.raw_client import RawClient
from tests.process.conftest import Connect, Nodes, names_of

LONG = 400  # tokens: still running when the fault comes


async def all_ready(client: RawClient, restarts: int = 0) -> dict[str, Any]:
    """The stats once every worker is ready, and so many were started again."""
    while True:
        stats = await client.stats()
        workers = stats["workers"]
        told = sum(worker["restarts"] > 0 for worker in workers)
        if told >= restarts and all(worker["state"] == "ready" for worker in workers):
            return stats


@pytest.mark.parametrize("victim", [0, 1, 2, 3])
async def test_a_killed_worker_costs_no_token(nodes: Nodes, connect: Connect, victim: int) -> None:
    node = nodes.start(layout="2p2d")
    client = await connect(node)
    for i in range(12):
        client.submit(i, [i, 2 * i], max_tokens=200)
    await client.read_until(lambda: len(client.tokens) == 12)
    pids = {w["index"]: w["pid"] for w in (await client.stats())["workers"]}
    os.kill(pids[victim], signal.SIGKILL)
    await client.finish(*range(12))
    for i in range(12):
        assert client.tokens[i] == expected_stream([i, 2 * i], 200)
        assert [end.reason for end in client.ends[i]] == ["length"]
    workers = (await all_ready(client, restarts=1))["workers"]
    assert [w["restarts"] for w in workers] == [int(index == victim) for index in range(4)]
    assert "was killed by SIGKILL" in workers[victim]["reason"]
    for i in range(12, 24):
        client.submit(i, [i, 2 * i], max_tokens=20)
    await client.finish(*range(12, 24))
    assert all(client.tokens[i] == expected_stream([i, 2 * i], 20) for i in range(12, 24))


async def test_losing_a_whole_role_for_good_ends_all_requests_and_the_node(
    nodes: Nodes, connect: Connect
) -> None:
    node = nodes.start(layout="1p1d", max_restarts=0)
    client = await connect(node)
    for i in range(6):
        client.submit(i, [i], max_tokens=LONG)
    await client.read_until(lambda: len(client.tokens) == 6)
    pids = {w["role"]: w["pid"] for w in (await client.stats())["workers"]}
    os.kill(pids["decode"], signal.SIGKILL)
    await client.read_to_end()
    codes = {end.code for ends in client.ends.values() for end in ends}
    assert all(len(ends) == 1 for ends in client.ends.values()) and codes <= {None, "worker_lost"}
    assert len(client.ends) == 6
    assert node.wait() == 1
    assert not node.socket.exists() and not names_of(node.pid)
