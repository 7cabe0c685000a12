"""Instances of several workers, with ranks that share experts or without, as processes: they give
the tokens of one worker, also when a rank is lost in a pass, and end by themselves."""

import asyncio
from pathlib import Path

import pytest

from nodeserve.layout import parse_layout
from nodeserve.wire.messages import Stop
from tests.fakes.raw_client import RawClient
from tests.process.conftest import Connect, Nodes, RunningNode, audit
from tests.process.test_lost_workers import all_ready
from tests.process.test_node import settled
from tests.process.test_sim_node import same_steps, workers_by_instance
from tests.process.test_stopping import STOPPED, left_nothing
from tests.reference import hub

pytestmark = pytest.mark.slow

NUM_TOKENS = 16
PROMPTS = [[(7 * i + 31 * number) % 200 + 1 for i in range(3 + 30 * number)] for number in range(5)]
SETTINGS = {"real": True, "max_model_len": 256, "dtype": "float32", "kv_memory": 4 << 20}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3-moe")
    # Where there are two stages, the first has no experts: it could run ahead of the other ranks.
    hub.write("qwen3-moe", folder, mlp_only_layers=[0])
    (folder / "tokenizer.json").write_text("{}")  # has to be there; nobody sends text
    return folder


async def serve(nodes: Nodes, connect: Connect, model: Path, layout: str) -> list[list[int]]:
    """All that `answers` asks of a node that then goes."""
    node = nodes.start(layout=layout, model=str(model), **SETTINGS)
    told = await answers(await connect(node), layout)
    assert not audit(node)
    nodes.end()
    nodes.running.clear()
    return told


async def answers(client: RawClient, layout: str) -> list[list[int]]:
    """Greedy tokens of all prompts at once, and then of one alone, beside whom other ranks have
    nothing to do."""
    submit_all(client)
    await client.finish(*range(len(PROMPTS)))
    client.submit(len(PROMPTS), PROMPTS[1], max_tokens=NUM_TOKENS)
    await client.finish(len(PROMPTS))
    if "ep" in layout:
        await same_steps(client)
    await settled(client)
    return [client.tokens[number] for number in range(len(PROMPTS) + 1)]


def submit_all(client: RawClient) -> None:
    for number, prompt in enumerate(PROMPTS):
        client.submit(number, prompt, max_tokens=NUM_TOKENS)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return []


async def told_by_one(
    nodes: Nodes, connect: Connect, model: Path, expected: list[list[int]]
) -> list[list[int]]:
    if not expected:
        expected += await serve(nodes, connect, model, "1m")
        assert expected[-1] == expected[1]
    return expected


@pytest.mark.parametrize("layout", ["1p:ep2,1d:ep2", "1p:tp2.pp2,1d:tp2.pp2"])
async def test_a_shape_gives_the_tokens_of_one_worker(
    nodes: Nodes, connect: Connect, model: Path, expected: list[list[int]], layout: str
) -> None:
    wanted = await told_by_one(nodes, connect, model, expected)
    assert await serve(nodes, connect, model, layout) == wanted


@pytest.mark.parametrize(
    ("layout", "victim", "phase"),
    [("1m:ep2", 1, "decode"), ("1m:tp2.ep2", 3, "follow"), ("1m:pp2.ep2", 3, "follow")],
)
async def test_ranks_give_the_tokens_of_one_worker_and_lose_none_with_one_of_them(
    nodes: Nodes,
    connect: Connect,
    model: Path,
    expected: list[list[int]],
    layout: str,
    victim: int,
    phase: str,
) -> None:
    """One node from its first token to its end: a rank, or one that follows it, is killed in a
    pass, where the other rank waits for it in a layer's exchange; all come back and are stopped."""
    wanted = await told_by_one(nodes, connect, model, expected)
    settings = {**SETTINGS, "restart_delay": 0.0, "exit_grace_s": 3600.0}
    node = nodes.start(layout=layout, model=str(model), **settings)
    assert await answers(await connect(node), layout) == wanted
    client = await connect(node)
    submit_all(client)
    await client.read_until(lambda: len(client.tokens) == len(PROMPTS))
    order = nodes.order("kill", victim, phase)
    await client.finish(*range(len(PROMPTS)))
    assert [client.tokens[number] for number in range(len(PROMPTS))] == wanted[:-1]
    assert not order.exists()
    num_workers = parse_layout(layout).num_workers
    ranks = workers_by_instance(await all_ready(client, restarts=num_workers))[0]
    assert [worker["restarts"] for worker in ranks] == [1] * num_workers
    assert not audit(node)
    await stopped_in_a_pass(node, await connect(node))


async def stopped_in_a_pass(node: RunningNode, client: RawClient) -> None:
    """Nobody is killed before an hour is over. One that stopped left the others in a pass."""
    workers = node.worker_pids()
    for number in range(3):
        client.submit(number, PROMPTS[number], max_tokens=150)
    await client.read_until(lambda: len(client.tokens) == 3)
    client.send(Stop(False))
    await client.read_to_end()
    assert [end.code for ends in client.ends.values() for end in ends] == ["shutting_down"] * 3
    _, words = await asyncio.to_thread(node.process.communicate)
    assert node.process.returncode == STOPPED and "Traceback" not in words
    assert left_nothing(node, workers)
