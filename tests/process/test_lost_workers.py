"""Workers that end: the others go on, their requests do too, and they come back."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.faults import POISON, TIMEOUT_S
from tests.fakes.model import expected_stream
from tests.fakes.raw_client import RawClient
from tests.fakes.sim_worker import FAR_APART
from tests.fakes.sim_worker import expected_stream as simulated_stream
from tests.process.conftest import Connect, Nodes, RunningNode, audit, names_of

pytestmark = pytest.mark.slow

LONG = 400  # tokens: still running when the fault comes


async def all_ready(client: RawClient, restarts: int = 0) -> dict[str, Any]:
    """The stats once every worker is ready, and so many were started again."""
    async with client.tracing():
        while True:
            stats = await client.stats()
            workers = stats["workers"]
            told = sum(worker["restarts"] > 0 for worker in workers)
            if told >= restarts and all(worker["state"] == "ready" for worker in workers):
                return stats
            await client.worker_news()


async def restarts_after(client: RawClient, least: int = 0) -> list[int]:
    """How often each worker was started again, once all are ready and it was so often in all."""
    while True:
        told = [worker["restarts"] for worker in (await all_ready(client))["workers"]]
        if sum(told) >= least:
            return told


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    """2p2d, whose workers are killed one after the other."""
    nodes = Nodes(tmp_path_factory.mktemp("four"))
    try:
        yield nodes.start(layout="2p2d")
    finally:
        nodes.end()


@pytest.mark.parametrize("victim", [0, 1, 2, 3])
async def test_a_killed_worker_costs_no_token(
    four: RunningNode, connect: Connect, victim: int
) -> None:
    client = await connect(four)
    before = await restarts_after(client)
    for i in range(12):
        client.submit(i, [i, 2 * i], max_tokens=200)
    await client.read_until(lambda: len(client.tokens) == 12)
    pids = {w["index"]: w["pid"] for w in (await client.stats())["workers"]}
    os.kill(pids[victim], signal.SIGKILL)
    await client.finish(*range(12))
    for i in range(12):
        assert client.tokens[i] == expected_stream([i, 2 * i], 200)
        assert [end.reason for end in client.ends[i]] == ["length"]
    wanted = [was + (index == victim) for index, was in enumerate(before)]
    assert await restarts_after(client, sum(wanted)) == wanted
    assert "was killed by SIGKILL" in (await client.stats())["workers"][victim]["reason"]
    for i in range(12, 24):
        client.submit(i, [i, 2 * i], max_tokens=20)
    await client.finish(*range(12, 24))
    assert all(client.tokens[i] == expected_stream([i, 2 * i], 20) for i in range(12, 24))
    assert not audit(four)


@pytest.mark.parametrize("layout", ["1m", "2p2d"])
async def test_a_request_that_ends_every_worker_ends_alone(
    nodes: Nodes, connect: Connect, layout: str
) -> None:
    """Those that were beside it each time were blamed as it was."""
    (nodes.folder / "poison").write_text("segv")
    node = nodes.start(layout=layout, device="sim", restart_delay=0.0)
    client = await connect(node)
    prompts = [[number, 7] * 10 for number in range(POISON - 6, POISON + 6)]
    for number, prompt in enumerate(prompts):
        client.submit(number, [token % 97 for token in prompt], max_tokens=30)
    await client.finish(*range(12))
    for number, prompt in enumerate(prompts):
        (end,) = client.ends[number]
        if prompt[0] == POISON:
            assert (end.code, client.tokens.get(number, [])) == ("worker_lost", [])
        else:
            wanted = simulated_stream([token % 97 for token in prompt], 30)
            assert (end.reason, client.tokens[number]) == ("length", wanted)
    workers = (await all_ready(client, restarts=1))["workers"]
    assert sum(worker["restarts"] for worker in workers) == 3


STAND_STILL = {"restart_delay": 60.0}  # who ends stays away for the rest of the test


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_who_is_left_does_both(nodes: Nodes, connect: Connect, role: str) -> None:
    """Requests in every phase when it happens, and new ones, end as if nothing had been."""
    node = nodes.start(layout="1p1d", **STAND_STILL)
    client = await connect(node)
    for i in range(20):
        client.submit(i, [i, 2 * i] * 20, max_tokens=100)
    await client.read_until(lambda: len(client.tokens) >= 6)
    pids = {w["role"]: w["pid"] for w in (await client.stats())["workers"]}
    os.kill(pids[role], signal.SIGKILL)
    for i in range(20, 26):
        client.submit(i, [i, 2 * i] * 20, max_tokens=100)
    await client.finish(*range(26))
    for i in range(26):
        assert client.tokens[i] == expected_stream([i, 2 * i] * 20, 100)
    workers = {w["role"]: w for w in (await client.stats())["workers"]}
    other = workers["decode" if role == "prefill" else "prefill"]
    assert (other["state"], other["acting"]) == ("ready", "mixed")
    assert workers[role]["state"] == "restarting" and workers[role]["restart_in_s"] > 0


@pytest.mark.parametrize("layout", ["1m", "1p1d"])
async def test_requests_wait_for_the_only_ones_to_come_back(
    nodes: Nodes, connect: Connect, layout: str
) -> None:
    node = nodes.start(layout=layout, restart_delay=0.0)
    client = await connect(node)
    for i in range(6):
        client.submit(i, [i, 5], max_tokens=LONG, seed=i)
    await client.read_until(lambda: len(client.tokens) == 6)
    for pid in node.worker_pids():
        os.kill(pid, signal.SIGKILL)
    await client.finish(*range(6))
    for i in range(6):
        assert client.tokens[i] == expected_stream([i, 5], LONG)
    assert (await all_ready(client, restarts=1))["requests"]["failed"] == 0


async def test_who_keeps_dying_is_taken_out_and_the_end_says_so(
    nodes: Nodes, connect: Connect
) -> None:
    node = nodes.start(layout="1p1d", max_restarts=2, restart_delay=0.0)
    client = await connect(node)
    while (worker := (await client.stats())["workers"][1])["state"] != "taken out":
        if worker["state"] == "ready":
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker["pid"], signal.SIGKILL)
    assert worker["restarts"] == 2 and "was killed by SIGKILL" in worker["reason"]
    client.submit(1, [3], max_tokens=20)
    await client.finish(1)
    assert client.tokens[1] == expected_stream([3], 20)
    node.process.send_signal(signal.SIGTERM)
    assert node.wait() == 1 and not names_of(node.pid)


async def test_with_nobody_left_requests_end_and_so_does_the_node(
    nodes: Nodes, connect: Connect
) -> None:
    node = nodes.start(layout="1p1d", max_restarts=0)
    client = await connect(node)
    for i in range(6):
        client.submit(i, [i], max_tokens=LONG)
    await client.read_until(lambda: len(client.tokens) == 6)
    for pid in node.worker_pids():
        os.kill(pid, signal.SIGKILL)
    await client.read_to_end()
    codes = {end.code for ends in client.ends.values() for end in ends}
    assert all(len(ends) == 1 for ends in client.ends.values()) and codes <= {None, "worker_lost"}
    assert len(client.ends) == 6
    assert node.wait() == 1
    assert not node.socket.exists() and not names_of(node.pid)


async def test_a_worker_that_cannot_start_again_is_taken_out(
    nodes: Nodes, connect: Connect, tmp_path: Path
) -> None:
    """Its weights are gone by then: each try counts as a death."""
    weights = tmp_path / "weights"
    weights.touch()
    settings = {"max_restarts": 2, "restart_delay": 0.0, "fake": {"weights": str(weights)}}
    node = nodes.start(layout="2m", **settings)
    client = await connect(node)
    weights.unlink()
    os.kill((await client.stats())["workers"][0]["pid"], signal.SIGKILL)
    while (worker := (await client.stats())["workers"][0])["state"] != "taken out":
        pass
    assert "no such weights" in worker["reason"] and worker["restarts"] == 2
    client.submit(1, [3], max_tokens=20)
    await client.finish(1)
    assert client.tokens[1] == expected_stream([3], 20)


HANGS = {"step_timeout": TIMEOUT_S, "restart_delay": 0.0}


@pytest.mark.parametrize("fault", ["stop", "spin", "hang"])
async def test_a_worker_that_gets_on_with_nothing_is_ended(
    nodes: Nodes, connect: Connect, fault: str
) -> None:
    """Stopped by a signal; turning its loop while no step ends; stuck."""
    node = nodes.start(layout="1p1d", device="sim", **HANGS)
    client = await connect(node)
    order = nodes.order(fault, 1, "decode")
    client.submit(1, [3], max_tokens=100)
    await client.finish(1)
    assert client.tokens[1] == simulated_stream([3], 100) and not order.exists()
    workers = (await all_ready(client, restarts=1))["workers"]
    words = "has done none" if fault == "spin" else "its loop has not turned"
    assert [worker["restarts"] for worker in workers] == [0, 1] and words in workers[1]["reason"]


async def test_a_node_that_was_suspended_whole_blames_nobody(
    nodes: Nodes, connect: Connect
) -> None:
    node = nodes.start(layout="1p1d", device="sim", **HANGS)
    client = await connect(node)
    client.submit(1, [3], max_tokens=200)
    await client.read_until(lambda: 1 in client.tokens)
    pids = [*node.worker_pids(), node.pid]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    with contextlib.suppress(TimeoutError):  # nothing comes meanwhile
        await asyncio.wait_for(client.read_to_end(), 3 * TIMEOUT_S)
    for pid in reversed(pids):
        os.kill(pid, signal.SIGCONT)
    again = await connect(node)
    again.submit(1, [4], max_tokens=20)
    await again.finish(1)
    assert again.tokens[1] == simulated_stream([4], 20)
    assert [worker["restarts"] for worker in (await again.stats())["workers"]] == [0, 0]


async def test_a_child_that_a_worker_leaves_behind_does_not_hide_its_end(
    nodes: Nodes, connect: Connect
) -> None:
    """It holds the worker's stderr open."""
    node = nodes.start(layout="1m", restart_delay=0.0, fake={"leaves_child": True})
    client = await connect(node)
    os.kill(node.worker_pids()[0], signal.SIGKILL)
    client.submit(1, [3], max_tokens=5)
    await client.finish(1)
    assert client.tokens[1] == expected_stream([3], 5)
    assert (await client.stats())["workers"][0]["restarts"] == 1


async def test_pages_on_their_way_from_a_dead_worker_are_computed_again(
    nodes: Nodes, connect: Connect
) -> None:
    """Nobody waits for a copy out of memory that its next life writes to."""
    far = {"profile": FAR_APART.name, "restart_delay": 0.0}
    node = nodes.start(layout="1p1d", device="sim", **far)
    client = await connect(node)
    order = nodes.order("kill", 0, "handoff")
    prompt = [7] * 100
    client.submit(1, prompt, max_tokens=20)
    await client.finish(1)
    assert client.tokens[1] == simulated_stream(prompt, 20) and not order.exists()
    assert client.ends[1][0].timings["num_preemptions"] == 1
    assert [worker["restarts"] for worker in (await client.stats())["workers"]] == [1, 0]


@pytest.mark.parametrize("state", ["restarting", "starting"])
async def test_a_stop_does_not_wait_for_who_is_away(
    nodes: Nodes, connect: Connect, state: str
) -> None:
    delay_s = 60.0 if state == "restarting" else 0.0
    settings = {"restart_delay": delay_s, "fake": {"load_again_s": 60.0}}
    node = nodes.start(layout="2m", **settings)
    client = await connect(node)
    os.kill((await client.stats())["workers"][0]["pid"], signal.SIGKILL)
    while (await client.stats())["workers"][0]["state"] != state:
        pass
    workers = node.worker_pids()
    node.process.send_signal(signal.SIGTERM)
    assert node.wait() == 0 and not names_of(node.pid)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
