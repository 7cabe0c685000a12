"""How a node ends: drains, signals, kills; what clients are told, what is left, the exit code."""

import asyncio
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nodeserve.wire.messages import End, Stop
from tests.fakes.model import expected_stream
from tests.fakes.raw_client import RawClient
from tests.patience import PATIENCE_S
from tests.process.conftest import Connect, Nodes, RunningNode, names_of

pytestmark = pytest.mark.slow

LONG = 150  # tokens: still running when the end comes
SLOW = {"step_s": 0.01}
ENDLESS = {"step_s": 0.2}  # for who is to be cut off, however late the end comes
STOPPED, FAILED, CUT_OFF = 0, 1, 3


async def running(
    nodes: Nodes, connect: Connect, **settings: object
) -> tuple[RunningNode, RawClient]:
    """A node, and a client whose request 1 has begun to stream."""
    node = nodes.start(**{"layout": "1p1d", "fake": SLOW, **settings})
    client = await connect(node)
    client.submit(1, [3], max_tokens=LONG)
    await client.read_until(lambda: 1 in client.tokens)
    return node, client


def left_nothing(node: RunningNode, workers: list[int]) -> bool:
    alive = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    return not (alive or node.socket.exists() or names_of(node.pid))


async def stopping(client: RawClient) -> End:
    """Returns when the server has begun to stop: how it refuses a request of `client`."""
    for number in itertools.count(10_000):
        client.submit(number, [1], max_tokens=0)  # refused in any case, and at once
        await client.finish(number)
        (refused,) = client.ends[number]
        if refused.code == "shutting_down":
            return refused
    raise AssertionError


# ---- drains


@pytest.mark.parametrize("how", ["stop", "SIGTERM", "SIGINT", "SIGHUP", "whole group"])
async def test_a_drain_finishes_what_runs_and_refuses_the_rest(
    nodes: Nodes, connect: Connect, how: str
) -> None:
    """A SIGTERM that reached the workers as well ended their requests with worker_lost."""
    node, client = await running(nodes, connect)
    workers = node.worker_pids()
    client.submit(2, [4, 5], max_tokens=30)
    if how == "stop":
        client.send(Stop(True))
    elif how == "whole group":
        for pid in (*workers, node.pid):
            os.kill(pid, signal.SIGTERM)
    else:
        node.process.send_signal(getattr(signal, how))
    late = await connect(node)
    refused = await stopping(late)
    assert refused.retry_after_s is not None and 1.0 <= refused.retry_after_s <= 30.0
    await client.finish(1, 2)
    await client.read_to_end()
    assert client.tokens[1] == expected_stream([3], LONG)
    assert client.tokens[2] == expected_stream([4, 5], 30)
    assert client.goodbye is not None and client.goodbye.code == "shutting_down"
    assert node.wait() == STOPPED
    assert left_nothing(node, workers)


async def test_what_does_not_end_in_time_is_ended(nodes: Nodes, connect: Connect) -> None:
    node, client = await running(nodes, connect, drain_timeout=0.1, fake=ENDLESS)
    node.process.send_signal(signal.SIGTERM)
    await client.read_to_end()
    assert [end.code for end in client.ends[1]] == ["shutting_down"]
    got = client.tokens[1]
    assert 0 < len(got) < LONG and got == expected_stream([3], LONG)[: len(got)]
    assert client.goodbye is not None
    assert node.wait() == CUT_OFF


@pytest.mark.parametrize("hurry", ["SIGINT", "stop"])
async def test_a_drain_can_be_cut_short(nodes: Nodes, connect: Connect, hurry: str) -> None:
    """By the second Ctrl-C, which waits for no worker either, or a stop that does not drain."""
    node, client = await running(nodes, connect, fake=ENDLESS)
    workers = node.worker_pids()
    if hurry == "SIGINT":
        os.kill(workers[0], signal.SIGSTOP)  # it would leave no earlier than it is killed
    node.process.send_signal(signal.SIGINT)
    await stopping(client)
    if hurry == "SIGINT":
        node.process.send_signal(signal.SIGINT)
    else:
        (await connect(node)).send(Stop(False))
    await client.read_to_end()
    assert [end.code for end in client.ends[1]] == ["shutting_down"]
    assert node.wait() == CUT_OFF
    assert left_nothing(node, workers)


async def test_sigterm_twice_is_no_hurry(nodes: Nodes, connect: Connect) -> None:
    """Some tools signal a process and then its group."""
    node, client = await running(nodes, connect)
    node.process.send_signal(signal.SIGTERM)
    await stopping(client)
    node.process.send_signal(signal.SIGTERM)
    await client.read_to_end()
    assert client.tokens[1] == expected_stream([3], LONG)
    assert node.wait() == STOPPED


async def test_a_stop_without_a_drain_ends_what_runs(nodes: Nodes, connect: Connect) -> None:
    node, client = await running(nodes, connect, fake=ENDLESS)
    client.send(Stop(False))
    await client.read_to_end()
    assert [end.code for end in client.ends[1]] == ["shutting_down"]
    assert node.wait() == STOPPED


async def test_a_drain_ends_when_nobody_is_left(nodes: Nodes, connect: Connect) -> None:
    """A worker's end during a drain was taken for part of the stop, and the drain waited on."""
    node, client = await running(nodes, connect, max_restarts=0, fake=ENDLESS)
    workers = node.worker_pids()
    client.send(Stop(True))
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    await client.read_to_end()
    assert [end.code for end in client.ends[1]] == ["worker_lost"]
    assert node.wait() == FAILED


async def test_a_worker_lost_during_a_drain_costs_no_token(nodes: Nodes, connect: Connect) -> None:
    node, client = await running(nodes, connect, restart_delay=0.0)
    client.send(Stop(True))
    os.kill(node.worker_pids()[1], signal.SIGKILL)
    await client.read_to_end()
    assert client.tokens[1] == expected_stream([3], LONG)
    assert [end.reason for end in client.ends[1]] == ["length"]
    assert node.wait() == STOPPED


# ---- clients that do not read


UNREAD = 1000  # answers, of some 3 KB each: more than all buffers between take


async def unread(
    nodes: Nodes, connect: Connect, **settings: object
) -> tuple[RunningNode, RawClient]:
    """A node that has finished all requests of a client, which has read nothing."""
    node = nodes.start(layout="1p1d", **settings)
    late = await connect(node, limit_bytes=1024)
    for number in range(UNREAD):
        late.submit(number, [number % 97], max_tokens=10, logprobs=20)
    await late.writer.drain()
    watcher = await connect(node)
    while (await watcher.stats())["requests"]["finished"] < UNREAD:
        pass  # the test's timeout bounds it
    return node, late


async def test_a_drain_waits_for_clients_that_read_late(nodes: Nodes, connect: Connect) -> None:
    """Its last answers were dropped with the connection."""
    node, late = await unread(nodes, connect)
    witness = await connect(node)
    node.process.send_signal(signal.SIGTERM)
    await witness.read_to_end()
    await late.read_to_end()
    for number in range(UNREAD):
        assert late.tokens[number] == expected_stream([number % 97], 10)
        assert [end.reason for end in late.ends[number]] == ["length"]
    assert late.goodbye is not None
    assert node.wait() == STOPPED


async def test_a_client_that_never_reads_holds_nobody_up(nodes: Nodes, connect: Connect) -> None:
    node, _ = await unread(nodes, connect, drain_timeout=0.1)
    node.process.send_signal(signal.SIGTERM)
    assert node.wait() == CUT_OFF


# ---- starts that are ended


def test_stop_reaches_a_server_that_still_loads(nodes: Nodes) -> None:
    node = nodes.spawn(layout="1m", fake={"load_s": 60.0})
    while not node.socket.exists():
        assert node.process.poll() is None
    command = [sys.executable, "-m", "nodeserve", "stop", "--socket", str(node.socket)]
    stop = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (stop.returncode, stop.stdout) == (0, f"stopped (pid {node.pid})\n"), stop.stderr
    assert node.wait() == FAILED and not node.socket.exists()


def test_a_signal_while_starting_stops_without_a_traceback(nodes: Nodes) -> None:
    node = nodes.spawn(layout="1p1d", fake={"load_s": 60.0})
    while len(workers := node.worker_pids()) < 2:  # the signal handlers are there before them
        assert node.process.poll() is None
    node.process.send_signal(signal.SIGINT)
    _, words = node.process.communicate(timeout=PATIENCE_S)
    assert node.process.returncode == FAILED
    assert "stopped while starting" in words and "Traceback" not in words
    assert left_nothing(node, workers)


# ---- a coordinator that is killed


async def gone(pid: int) -> None:
    """Returns when a process has ended: its descriptor says so."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_reader(descriptor, ended.set)
    await ended.wait()
    loop.remove_reader(descriptor)
    os.close(descriptor)


async def test_a_killed_coordinator_takes_its_workers_and_leaves_nothing(
    nodes: Nodes, connect: Connect
) -> None:
    node, client = await running(nodes, connect, layout="2p1d", fake=ENDLESS)
    workers = node.worker_pids()
    assert len(workers) == 3
    os.kill(workers[0], signal.SIGSTOP)  # also one that cannot notice
    node.process.kill()
    await client.read_to_end()
    for pid in workers:
        await gone(pid)
    await asyncio.to_thread(node.process.communicate)  # its janitor has the other end as well
    assert not names_of(node.pid) and not node.socket.exists()
