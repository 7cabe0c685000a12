"""`nodeserve status --health` and a client's `health()` of real nodes."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys

import pytest

from nodeserve.client import AsyncClient
from nodeserve.wire.messages import Stop
from tests.fakes.model import expected_stream
from tests.process.conftest import Connect, Nodes, RunningNode

pytestmark = pytest.mark.slow


async def verdict(node: RunningNode) -> tuple[int, str]:
    """Exit code and words of the command."""
    words = ["-m", "nodeserve", "status", "--health", "--socket", str(node.socket)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode().strip()


async def test_a_node_is_ready_then_degraded_then_stopping(nodes: Nodes, connect: Connect) -> None:
    node = nodes.start(layout="1p2d", fake={"step_s": 0.01}, max_restarts=0)
    assert await verdict(node) == (0, "ready")
    client = await connect(node)
    workers = (await client.stats())["workers"]
    os.kill(workers[2]["pid"], signal.SIGKILL)
    async with AsyncClient(node.socket) as asking:
        while "taken out" not in "".join((health := await asking.health()).reasons):
            pass  # until its end was seen; the test's timeout bounds it
    assert (health.state, health.ready) == ("degraded", True) and health.loop_lag_s < 60.0
    words = (
        "decode worker 2 is taken out"
        " (decode worker 2 was killed by SIGKILL, by hand or for want of memory)"
    )
    assert health.reasons == (words,)
    assert await verdict(node) == (0, f"degraded: {words}")
    client.submit(1, [3], max_tokens=400)
    await client.read_until(lambda: 1 in client.tokens)
    client.send(Stop(True))
    code, words = await verdict(node)
    assert code == 1 and words.startswith("stopping: it was told to stop")
    client.send(Stop(False))
    await client.read_to_end()
    node.wait()


async def test_a_node_that_does_not_answer_is_not_healthy(nodes: Nodes) -> None:
    """Peers' said "healthy" as long as the process existed."""
    node = nodes.start(layout="1m")
    node.process.send_signal(signal.SIGSTOP)
    try:
        code, words = await verdict(node)
    finally:
        node.process.send_signal(signal.SIGCONT)
    assert code == 1 and "did not answer in 3 s" in words


async def test_a_worker_that_stands_still_while_idle_is_found(nodes: Nodes) -> None:
    node = nodes.start(layout="1p1d")
    pid = node.worker_pids()[1]
    os.kill(pid, signal.SIGSTOP)
    try:
        async with AsyncClient(node.socket) as client:
            while (health := await client.health()).ready:
                pass
            assert health.state == "not ready"
            assert health.reasons[0] == "nobody is there for decode"
            assert health.reasons[1].startswith("decode worker 1 has been silent for")
            os.kill(pid, signal.SIGCONT)
            while not (await client.health()).ready:
                pass
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_a_node_that_still_loads_is_not_healthy(nodes: Nodes) -> None:
    node = nodes.spawn(layout="1m", fake={"load_s": 60.0})
    while not node.socket.exists():
        assert node.process.poll() is None
    code, words = await verdict(node)
    assert code == 1 and "may still be loading" in words


async def test_a_wait_that_never_ends_by_itself_is_ended(nodes: Nodes, connect: Connect) -> None:
    """A clock that is set back prolongs the waits that are under way. Idle workers did not give a
    sign of life any more, and were killed for it."""
    node = nodes.start(layout="1p1d", step_timeout=2.0, fake={"oversleeps": True})
    client = await connect(node)
    with contextlib.suppress(TimeoutError):  # nothing comes meanwhile
        await asyncio.wait_for(client.read_to_end(), 5.0)
    again = await connect(node)
    again.submit(1, [3], max_tokens=20)
    await again.finish(1)
    assert again.tokens[1] == expected_stream([3], 20)
    assert [worker["restarts"] for worker in (await again.stats())["workers"]] == [0, 0]
