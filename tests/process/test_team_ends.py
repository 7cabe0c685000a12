"""Instances of several workers that are ended or cannot begin, while their workers wait for each
other: what clients are told, and that nothing is left."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from nodeserve.wire.messages import Stop
from tests.fakes.raw_client import RawClient
from tests.fakes.sim_worker import expected_stream
from tests.patience import PATIENCE_S
from tests.process.conftest import Connect, Nodes, names_of
from tests.process.test_sim_node import prompt_of
from tests.process.test_stopping import FAILED, STOPPED, gone, left_nothing
from tests.reference import odd_model
from tests.reference.odd_model import settings_of
from tests.repeats import repeats

pytestmark = pytest.mark.slow

SOME, MANY = 100, 250  # tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return odd_model.write(tmp_path_factory.mktemp("odd"))


def submit_all(client: RawClient, num_tokens: int) -> None:
    for number in range(3):
        client.submit(number, [number, 5], max_tokens=num_tokens)


SHAPES = ["1m:tp2.pp2", "1m:pp2.ep2", *repeats([], ["1m:ep2"])]


@pytest.mark.repeats
@pytest.mark.parametrize("layout", SHAPES)
async def test_a_killed_coordinator_takes_those_in_a_collective_with_it(
    nodes: Nodes, connect: Connect, model: Path, layout: str
) -> None:
    """One of them stands still in the step, the others wait for it."""
    node = nodes.start(**settings_of(layout, model))
    client, workers = await connect(node), node.worker_pids()
    order = nodes.order("stop", 1, "follow" if "." in layout else "decode")
    submit_all(client, SOME)
    while order.exists():
        await client.stats()
    node.process.kill()
    await client.read_to_end()
    for pid in workers:
        await gone(pid)
    await asyncio.to_thread(node.process.communicate)  # its janitor has the other end as well
    assert not names_of(node.pid) and not node.socket.exists()


# Ranks that share experts are stopped without a drain in tests/process/test_cpu_ranks.py.
STOPS = [*((layout, True) for layout in SHAPES), ("1m:tp2.pp2", False)]


@pytest.mark.repeats
@pytest.mark.parametrize(("layout", "drain"), STOPS)
async def test_a_stop_finds_teams_in_the_middle_of_steps(
    nodes: Nodes, connect: Connect, model: Path, layout: str, drain: bool
) -> None:
    node = nodes.start(**settings_of(layout, model))
    client, workers = await connect(node), node.worker_pids()
    submit_all(client, SOME if drain else MANY)
    await client.read_until(lambda: len(client.tokens) == 3)
    client.send(Stop(drain))
    await client.read_to_end()
    ends = [end for number in range(3) for end in client.ends[number]]
    if drain:
        assert [end.reason for end in ends] == ["length"] * 3
        assert [len(client.tokens[number]) for number in range(3)] == [SOME] * 3
    else:
        assert [end.code for end in ends] == ["shutting_down"] * 3
    _, words = await asyncio.to_thread(node.process.communicate)
    assert node.process.returncode == STOPPED and "Traceback" not in words
    assert left_nothing(node, workers)


async def test_a_team_stands_in_for_one_that_stays_away(nodes: Nodes, connect: Connect) -> None:
    """One follower is lost. What the others do then is told of each of them: the prefill team's
    own follower was said to prefill still."""
    node = nodes.start(layout="1p:tp2,1d:tp2", device="sim", restart_delay=60.0)
    client = await connect(node)
    for number in range(8):
        client.submit(number, prompt_of(number), max_tokens=60)
    await client.read_until(lambda: len(client.tokens) >= 3)
    os.kill((await client.stats())["workers"][3]["pid"], signal.SIGKILL)
    for number in range(8, 12):
        client.submit(number, prompt_of(number), max_tokens=60)
    await client.finish(*range(12))
    for number in range(12):
        assert client.tokens[number] == expected_stream(prompt_of(number), 60)
    workers = (await client.stats())["workers"]
    assert [one["acting"] for one in workers[:2]] == ["mixed"] * 2
    assert [one["state"] for one in workers] == ["ready"] * 2 + ["restarting"] * 2


# ---- starts


def with_wrong_shape(folder: Path) -> str:
    """Of a layer of the second stage."""
    path = folder / "model.safetensors"
    tensors, name = load_file(path), "model.layers.2.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name][:-1].clone()}, path)
    return f"{name} has the shape (287, 96), expected (288, 96)"


def without_a_tensor(folder: Path) -> str:
    path = folder / "model.safetensors"
    tensors, name = load_file(path), "model.layers.2.self_attn.o_proj.weight"
    del tensors[name]
    save_file(tensors, path)
    return f"has no tensor {name}"


@pytest.mark.parametrize("spoil", [with_wrong_shape, without_a_tensor])
def test_a_member_that_cannot_load_ends_the_start_with_its_words(
    nodes: Nodes, tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    """The first stage can, and waits for the second."""
    folder = odd_model.write(tmp_path)
    expected = spoil(folder)
    node = nodes.spawn(**settings_of("1m:pp2", folder))
    _, words = node.process.communicate(timeout=PATIENCE_S)
    assert node.process.returncode == FAILED and expected in words
    assert not node.socket.exists() and not names_of(node.pid)


def test_a_member_killed_in_its_start_ends_it(nodes: Nodes, model: Path) -> None:
    """The others wait where all of an instance meet."""
    node = nodes.spawn(**settings_of("1m:tp2", model))
    while len(workers := node.worker_pids()) < 2:
        assert node.process.poll() is None
    os.kill(workers[1], signal.SIGKILL)
    _, words = node.process.communicate(timeout=PATIENCE_S)
    assert node.process.returncode == FAILED and "worker 1 was killed by SIGKILL" in words
    assert left_nothing(node, workers)
