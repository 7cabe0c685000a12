"""Phases of different shapes: the tokens of one worker, and none lost with a source's follower."""

import os
import signal
from pathlib import Path

import pytest

from tests.fakes.sim_worker import FAR_APART, expected_stream
from tests.process.conftest import Connect, Nodes
from tests.process.test_cpu_ranks import serve
from tests.process.test_lost_workers import all_ready
from tests.process.test_node import settled
from tests.reference import deepseek, hub
from tests.repeats import repeats

pytestmark = pytest.mark.slow

LAYOUTS = {
    # 2 KV heads and 3 layers: later ranks and stages have more of them, or the same.
    "heads": ["2p:tp2,1d", "1p:tp2.pp2,1d:tp4", "1p:ep2,1d:tp2", *repeats([], ["1p:pp2,1d:tp2"])],
    "latents": ["1p:tp2,1d:pp2"],
}
CASES = [(pages, layout) for pages, layouts in LAYOUTS.items() for layout in layouts]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in LAYOUTS}
    hub.write("qwen3-moe", folders["heads"])
    deepseek.saved(deepseek.reference("v3"), folders["latents"])
    for folder in folders.values():
        (folder / "tokenizer.json").write_text("{}")  # has to be there; nobody sends text
    return folders


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list[int]]]:
    return {}


@pytest.mark.repeats
@pytest.mark.parametrize(("pages", "layout"), CASES)
async def test_phases_of_different_shapes_give_the_tokens_of_one_worker(
    nodes: Nodes,
    connect: Connect,
    models: dict[str, Path],
    expected: dict[str, list[list[int]]],
    pages: str,
    layout: str,
) -> None:
    if pages not in expected:
        expected[pages] = await serve(nodes, connect, models[pages], "1m")
    assert await serve(nodes, connect, models[pages], layout) == expected[pages]


@pytest.mark.parametrize("layout", ["1p:tp2,1d", "1p:tp2,1d:pp2"])
async def test_a_source_that_loses_a_follower_during_a_pull_costs_no_token(
    nodes: Nodes, connect: Connect, layout: str
) -> None:
    """The pages take seconds to come over; its leader's are as lost as its own."""
    far = {"profile": FAR_APART.name, "restart_delay": 0.0}
    node = nodes.start(layout=layout, device="sim", **far)
    client = await connect(node)
    prompt = [7] * 50
    client.submit(1, prompt, max_tokens=20)
    await client.read_until(lambda: 1 in client.tokens)
    pids = [worker["pid"] for worker in (await client.stats())["workers"]]
    os.kill(pids[1], signal.SIGKILL)
    await client.finish(1)
    assert client.tokens[1] == expected_stream(prompt, 20)
    [end] = client.ends[1]
    assert end.reason == "length" and end.timings["num_preemptions"] == 1
    workers = (await all_ready(client, restarts=2))["workers"]
    assert [one["restarts"] for one in workers[:3]] == [1, 1, 0]
    await settled(client)
