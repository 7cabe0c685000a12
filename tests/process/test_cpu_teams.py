"""The embedded model on instances of several workers gives the tokens of one worker."""

import contextlib
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.process.conftest import Connect, Nodes, audit
from tests.process.test_lost_workers import all_ready
from tests.process.test_node import settled

pytestmark = pytest.mark.slow

NUM_TOKENS = 24
PROMPTS = [
    [(7 * place + 31 * number) % 5000 + 1 for place in range(3 + 40 * number)]
    for number in range(5)
]


def ports(pid: int) -> set[str]:
    """TCP sockets of a process, by inode, in whatever state."""
    known: set[str] = set()
    for table in ("tcp", "tcp6"):
        rows = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        known.update(f"socket:[{row.split()[9]}]" for row in rows)
    held: set[str] = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            held.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return known & held


async def streams(nodes: Nodes, connect: Connect, layout: str, **settings: Any) -> list[list[int]]:
    """Greedy tokens of all prompts at once, from a node that then goes."""
    node = nodes.start(layout=layout, real=True, **settings)
    assert not any(ports(pid) for pid in node.worker_pids()), "others could connect there"
    client = await connect(node)
    for number, prompt in enumerate(PROMPTS):
        client.submit(number, prompt, max_tokens=NUM_TOKENS)
    await client.finish(*range(len(PROMPTS)))
    await settled(client)
    assert not audit(node)
    nodes.end()
    nodes.running.clear()
    return [client.tokens[number] for number in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list[int]]]:
    return {}


def test_a_port_would_be_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)):
        assert ports(os.getpid())


@pytest.mark.parametrize(
    "layout", ["1m:tp2", "1p:tp2,1d:tp2", "1m:pp2", "1p:pp2,1d:pp2", "1m:tp2.pp2"]
)
async def test_a_team_gives_the_tokens_of_one_worker(
    nodes: Nodes, connect: Connect, expected: dict[str, list[list[int]]], layout: str
) -> None:
    if not expected:
        expected["1m"] = await streams(nodes, connect, "1m")
    assert await streams(nodes, connect, layout) == expected["1m"]


@pytest.mark.parametrize(
    ("layout", "fault", "victim"), [("1m:tp2", "kill", 1), ("1m:pp2", "stop", 1)]
)
async def test_a_follower_lost_in_a_step_costs_no_token(
    nodes: Nodes,
    connect: Connect,
    expected: dict[str, list[list[int]]],
    layout: str,
    fault: str,
    victim: int,
) -> None:
    """The others are in a collective with it, and would wait there for ever."""
    if not expected:
        expected["1m"] = await streams(nodes, connect, "1m")
    node = nodes.start(layout=layout, real=True, restart_delay=0.0, step_timeout=5.0)
    client = await connect(node)
    for number, prompt in enumerate(PROMPTS):
        client.submit(number, prompt, max_tokens=NUM_TOKENS)
    await client.read_until(lambda: len(client.tokens) == len(PROMPTS))
    order = nodes.order(fault, victim, "follow")
    await client.finish(*range(len(PROMPTS)))
    assert [client.tokens[number] for number in range(len(PROMPTS))] == expected["1m"]
    assert not order.exists()
    workers = (await all_ready(client, restarts=2))["workers"]
    assert [one["restarts"] for one in workers] == [1, 1]
    if fault == "kill":
        assert "worker 1 was killed by SIGKILL" in workers[0]["reason"]
    else:  # its leader, which waits for it, may have been found first
        assert "worker 1 " in workers[0]["reason"] and "hung" in workers[0]["reason"]
