"""A real node and who may connect to it: other users, too many clients, clients that run wild."""

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeserve.client import AsyncClient
from nodeserve.errors import Overloaded
from nodeserve.wire.messages import GetStats
from tests.process.conftest import Connect, Nodes

NOBODY = 65534
# It becomes somebody else by itself: others may not even run our interpreter.
CONNECT = """
import os, socket, sys
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
with socket.socket(socket.AF_UNIX) as connected:
    connected.connect(sys.argv[1])
    print(connected.recv(4096))
"""


def as_nobody(path: Path) -> "subprocess.CompletedProcess[str]":
    """Another user connects and says what the server told it."""
    command = [sys.executable, "-c", CONNECT, str(path), str(NOBODY)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({}, "PermissionError"),
        ({"socket_mode": "666"}, "max_model_len"),
        ({"socket_mode": "666", "allow_users": "root"}, "forbidden"),
        ({"socket_mode": "666", "allow_users": f"root,{NOBODY}"}, "max_model_len"),
        ({"socket_group": str(NOBODY)}, "max_model_len"),
    ],
)
async def test_other_users_are_let_in_only_if_they_may(
    open_folder: Path, nodes: Nodes, connect: Connect, settings: dict[str, str], answer: str
) -> None:
    node = nodes.start(layout="1m", socket=open_folder / "node.sock", **settings)
    told = await asyncio.to_thread(as_nobody, node.socket)
    assert answer in told.stdout + told.stderr
    client = await connect(node)  # and we are served all the same
    client.submit(1, [5, 6, 7], max_tokens=4)
    await client.finish(1)


async def test_too_many_clients_are_turned_away_until_one_has_left(
    nodes: Nodes, connect: Connect
) -> None:
    node = nodes.start(layout="1m", max_connections=2)
    first, second = await connect(node), await connect(node)
    with pytest.raises(Overloaded, match="2 clients are connected already"):
        async with AsyncClient(node.socket) as third:
            await third.stats()
    await first.close()
    await second.stats()
    while True:  # until the server has seen that it left; the test's timeout bounds it
        try:
            async with AsyncClient(node.socket) as third:
                await third.stats()
                break
        except Overloaded:
            second.send(GetStats())


async def test_a_connection_has_its_quota_and_others_theirs(nodes: Nodes, connect: Connect) -> None:
    node = nodes.start(layout="1m", max_connection_reqs=3, fake={"step_s": 0.01})
    greedy, modest = await connect(node), await connect(node)
    for number in range(5):
        greedy.submit(number, [5, 6, 7], max_tokens=50)
    modest.submit(9, [5, 6, 7], max_tokens=5)
    await greedy.finish(*range(5))
    await modest.finish(9)
    reasons = [greedy.ends[number][0].reason for number in range(5)]
    assert reasons == ["length"] * 3 + ["error"] * 2
    refused = greedy.ends[4][0]
    assert refused.code == "overloaded" and refused.retry_after_s
    assert modest.ends[9][0].reason == "length"
    greedy.submit(7, [5, 6, 7], max_tokens=5)
    await greedy.finish(7)
    assert greedy.ends[7][0].reason == "length"


async def test_a_rate_that_is_too_high_is_refused_with_the_time_to_come_back(
    nodes: Nodes, connect: Connect
) -> None:
    node = nodes.start(layout="1m", max_connection_rate=0.001)
    client = await connect(node)
    for number in range(3):
        client.submit(number, [5, 6, 7], max_tokens=5)
    await client.finish(0, 1, 2)
    assert [client.ends[number][0].code for number in range(3)] == [
        None,
        "overloaded",
        "overloaded",
    ]
    assert client.ends[1][0].retry_after_s == pytest.approx(1000.0, rel=0.1)
