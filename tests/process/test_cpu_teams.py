"""The embedded model on instances of several workers gives the tokens of one worker, also when one
of them is lost in a step. More shapes, with a small model: tests/process/test_cpu_ranks.py."""

import contextlib
import os
import socket
from pathlib import Path

import pytest

from tests.fakes.raw_client import RawClient
from tests.process.conftest import Connect, Nodes, RunningNode, audit
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


def submit_all(client: RawClient) -> None:
    for number, prompt in enumerate(PROMPTS):
        client.submit(number, prompt, max_tokens=NUM_TOKENS)


async def answers(node: RunningNode, client: RawClient) -> list[list[int]]:
    """Greedy tokens of all prompts at once."""
    assert not any(ports(pid) for pid in node.worker_pids()), "others could connect there"
    submit_all(client)
    await client.finish(*range(len(PROMPTS)))
    await settled(client)
    assert not audit(node)
    return [client.tokens[number] for number in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return []


async def told_by_one(nodes: Nodes, connect: Connect, expected: list[list[int]]) -> list[list[int]]:
    if not expected:
        node = nodes.start(layout="1m", real=True)
        expected += await answers(node, await connect(node))
        nodes.end()
        nodes.running.clear()
    return expected


def test_a_port_would_be_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)):
        assert ports(os.getpid())


@pytest.mark.parametrize(("layout", "fault"), [("1m:tp2", "kill"), ("1m:pp2", "stop")])
async def test_a_team_gives_the_tokens_of_one_worker_and_loses_none_with_a_follower(
    nodes: Nodes, connect: Connect, expected: list[list[int]], layout: str, fault: str
) -> None:
    """The leader is in a collective with the one that is lost, and would wait there for ever."""
    wanted = await told_by_one(nodes, connect, expected)
    node = nodes.start(layout=layout, real=True, restart_delay=0.0, step_timeout=5.0)
    assert await answers(node, await connect(node)) == wanted
    client = await connect(node)
    submit_all(client)
    await client.read_until(lambda: len(client.tokens) == len(PROMPTS))
    order = nodes.order(fault, 1, "follow")
    await client.finish(*range(len(PROMPTS)))
    assert [client.tokens[number] for number in range(len(PROMPTS))] == wanted
    assert not order.exists()
    workers = (await all_ready(client, restarts=2))["workers"]
    assert [one["restarts"] for one in workers] == [1, 1]
    if fault == "kill":
        assert "worker 1 was killed by SIGKILL" in workers[0]["reason"]
    else:  # its leader, which waits for it, may have been found first
        assert "worker 1 " in workers[0]["reason"] and "hung" in workers[0]["reason"]
