"""`nodeserve trace` beside a running node: what it records adds up, and can be asked again."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nodeserve.errors import ConnectionLost
from nodeserve.plan.workloads import read_trace
from nodeserve.tracing.lanes import Lanes, lanes_of
from nodeserve.tracing.recording import Recording, record
from nodeserve.wire.messages import Abort, Trace
from tests.fakes.raw_client import RawClient
from tests.fakes.sim_worker import QUICK
from tests.fakes.trace_rules import check_request, check_trace, check_workers
from tests.patience import PATIENCE_S
from tests.process.conftest import Connect, Nodes, RunningNode
from tests.process.test_lost_workers import all_ready
from tests.process.test_sim_node import prompt_of

pytestmark = pytest.mark.slow

COMMAND = (sys.executable, "-m", "nodeserve")


async def begun(node: RunningNode, count: int) -> "asyncio.Task[Recording]":
    """A recording of so many requests, that has begun."""
    began = asyncio.Event()
    task = asyncio.ensure_future(record(node.socket, None, count, began.set))
    await began.wait()
    return task


async def serve(client: RawClient, numbers: range, num_tokens: int = 12) -> None:
    for number in numbers:
        client.submit(number, prompt_of(number), max_tokens=num_tokens)
        await client.stats()  # so that they do not all come at once
    await client.finish(*numbers)


async def lanes_recorded(recording: "asyncio.Task[Recording]") -> Lanes:
    found = await recording
    assert found.complete and found.over and not found.lost and found.error is None
    return lanes_of(found.events)


@pytest.mark.parametrize("layout", ["1m", "2p2d", "2p:ep2,1d:ep2"])
async def test_lanes_of_a_simulated_node_add_up(
    nodes: Nodes, connect: Connect, layout: str
) -> None:
    node = nodes.start(layout=layout, device="sim")
    client = await connect(node)
    recording = await begun(node, 40)
    await serve(client, range(40))
    lanes = await lanes_recorded(recording)
    assert len(lanes.requests) == 40
    assert all(check_request(lane) for lane in lanes.requests.values())
    told = {end.timings["decode_s"] for ends in client.ends.values() for end in ends}
    assert told == {
        lane.ended.timings["decode_s"] for lane in lanes.requests.values() if lane.ended
    }
    check_workers(lanes)
    passes = [one for lane in lanes.workers.values() for one in lane.passes]
    begins = [name for one in passes for name in one.facts["begins"]]
    assert sorted(begins) == sorted(f"r{number}" for number in lanes.requests), "each once"
    assert all(lanes.began_s < one.begin_s < one.end_s <= lanes.ended_s for one in passes)
    pulls = [one for lane in lanes.workers.values() for one in lane.pulls]
    assert len(pulls) == (0 if layout == "1m" else 40)
    moved = sum(end.timings["handoff_bytes"] for ends in client.ends.values() for end in ends)
    assert sum(one.facts["bytes"] for one in pulls) == moved


async def test_setbacks_and_lost_workers_are_in_it(nodes: Nodes, connect: Connect) -> None:
    """Too few blocks for all, and a worker that is killed."""
    blocks = 16 * QUICK.kv_bytes_per_token
    node = nodes.start(layout="2m", device="sim", max_model_len=160, kv_memory=14 * blocks)
    client = await connect(node)
    recording = await begun(node, 24)
    for number in range(24):
        client.submit(number, prompt_of(number % 5), max_tokens=100)
    await client.read_until(lambda: all(number in client.tokens for number in range(24)))
    os.kill((await client.stats())["workers"][1]["pid"], signal.SIGKILL)
    await client.finish(*range(24))
    lanes = await lanes_recorded(recording)
    assert all(check_request(lane) for lane in lanes.requests.values())
    check_workers(lanes)
    why = [mark.name for lane in lanes.requests.values() for mark in lane.marks]
    assert "preempted" in why and "its worker or pages are lost" in why
    assert lanes.workers[1].marks[0].name == "lost" and not lanes.workers[0].marks
    assert "SIGKILL" in lanes.workers[1].marks[0].facts["why"]
    await all_ready(client)


class Tracing:
    """`nodeserve trace` as a process, once it records."""

    def __init__(self, node: RunningNode, folder: Path, *options: str) -> None:
        self.out, self.rows = folder / "trace.json", folder / "rows.csv"
        files = f"--out={self.out}", f"--csv={self.rows}"
        self.process = subprocess.Popen(
            [*COMMAND, "trace", f"--socket={node.socket}", *files, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        assert line.startswith("recording"), line + self.process.communicate()[1]

    def end(self) -> tuple[int, str, str]:
        out, problems = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, out, problems


@contextlib.contextmanager
def tracing(node: RunningNode, folder: Path, *options: str) -> Iterator[Tracing]:
    started = Tracing(node, folder, *options)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.kill()
            started.process.communicate()


async def test_the_command_writes_files_that_simulate_takes(
    nodes: Nodes, connect: Connect, tmp_path: Path
) -> None:
    node = nodes.start(layout="1p1d", device="sim")
    client = await connect(node)
    with tracing(node, tmp_path, "--requests=20") as command:
        await serve(client, range(20))
        code, out, problems = command.end()
    assert (code, problems) == (0, "")
    assert f"{command.out}: " in out and " 20 requests, " in out and f"{command.rows}: 20" in out
    trace = json.loads(command.out.read_text())
    check_trace(trace)
    assert trace["otherData"]["layout"] == "1p1d" and trace["otherData"]["lost events"] == 0
    asked = read_trace(command.rows)
    assert [one.num_prompt_tokens for one in asked] == [len(prompt_of(n)) for n in range(20)]
    assert {one.num_output_tokens for one in asked} == {12}
    assert simulated(command.rows)["summaries"]["staggered"]["outcomes"] == {"length": 20}


def simulated(rows: Path) -> dict[str, Any]:
    """What `nodeserve simulate` makes of them with another layout."""
    options = f"--trace={rows}", "--layout=1p2d", "--json"
    done = subprocess.run([*COMMAND, "simulate", *options], capture_output=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
async def test_a_signal_ends_it_with_what_there_is(
    nodes: Nodes, connect: Connect, tmp_path: Path, number: signal.Signals
) -> None:
    node = nodes.start(layout="1p1d", device="sim")
    client = await connect(node)
    with tracing(node, tmp_path, "--seconds=600") as command:
        await serve(client, range(5))
        client.submit(9, [1, 2, 3], max_tokens=900)
        await client.read_until(lambda: 9 in client.tokens)
        command.process.send_signal(number)
        code, out, problems = command.end()
    assert (code, problems) == (0, "") and "; 1 that ended without" in out
    check_trace(json.loads(command.out.read_text()))
    assert len(read_trace(command.rows)) == 5
    client.send(Abort(9))
    await client.finish(9)


async def test_a_server_that_ends_leaves_what_came_before(
    nodes: Nodes, connect: Connect, tmp_path: Path
) -> None:
    node = nodes.start(layout="1p1d", device="sim")
    client = await connect(node)
    with tracing(node, tmp_path, "--seconds=600") as command:
        await serve(client, range(5))
        node.process.send_signal(signal.SIGTERM)
        code, _, problems = command.end()
    assert code == 1 and "Error: the server was stopped" in problems
    check_trace(json.loads(command.out.read_text()))
    assert len(read_trace(command.rows)) == 5
    assert node.wait() == 0


async def test_one_who_traces_and_never_reads_holds_up_nobody(
    nodes: Nodes, connect: Connect
) -> None:
    node = nodes.start(layout="1p1d", device="sim")
    deaf = await connect(node, limit_bytes=1 << 10)
    deaf.send(Trace(True))
    client = await connect(node)
    await serve(client, range(40), num_tokens=100)
    assert all(len(client.tokens[number]) == 100 for number in range(40))


async def test_without_a_server_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConnectionLost, match="no server"):
        await record(tmp_path / "none.sock", 1.0, None)
