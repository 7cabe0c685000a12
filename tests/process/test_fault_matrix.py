"""Every fault, in every phase of a request, in a worker of every role: no stream notices.

Simulated workers. In each cell one fails while requests run; all of these must end with their known
tokens, and the worker must be back, for the reason that it had. The first layout has two of each
kind, so that the others can do what the failed one did; in the second nobody else can but by
standing in; in the third an instance has two ranks, which fail and come back together. The cells of
a layout share a node.
"""

import math
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.faults import TIMEOUT_S
from tests.fakes.raw_client import RawClient
from tests.fakes.sim_worker import expected_stream
from tests.process.conftest import Connect, Nodes, RunningNode, names_of
from tests.process.test_lost_workers import all_ready
from tests.process.test_node import settled
from tests.repeats import repeats

REASONS = {
    "kill": "was killed by SIGKILL",
    "segv": "was killed by SIGSEGV",
    "exception": "failed: RuntimeError: a fault to order",
    "hang": "hung: ",
    "slow": "",  # it is none, and is not taken for one
    "torn": "damaged or out of order",
}
PHASES = ("buffered", "prefill", "handoff", "decode", "idle")
ROLES = ("prefill", "decode", "mixed")
LAYOUT, ALONE, RANKS = "2p2d2m", "1p1d", "1p:ep2,1d:ep2"
CELLS = [
    *((LAYOUT, phase, role) for role in ROLES for phase in PHASES),
    *((layout, phase, "prefill") for layout in (ALONE, RANKS) for phase in ("prefill", "handoff")),
    *((layout, phase, "decode") for layout in (ALONE, RANKS) for phase in ("handoff", "decode")),
]
# To the node an end by one signal is as any other: SIGSEGV in one phase; `make test-long` has all.
FAULTS = [
    (*cell, fault)
    for cell in CELLS
    for fault in REASONS
    if fault != "segv" or cell[1] == "decode" or repeats(False, True)
]
SETTINGS = {"step_timeout": TIMEOUT_S, "restart_delay": 0.0, "max_restarts": 1000}
Request = tuple[list[int], int]  # prompt, tokens to get


class Cells:
    """The nodes, one for each layout that was asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self.started: dict[str, tuple[Nodes, RunningNode]] = {}
        self.num_fds: dict[str, int] = {}  # of each coordinator, before the first fault
        self._factory = factory

    def of(self, layout: str) -> tuple[Nodes, RunningNode]:
        if layout not in self.started:
            nodes = Nodes(self._factory.mktemp("faults"))
            self.started[layout] = nodes, nodes.start(layout=layout, device="sim", **SETTINGS)
        return self.started[layout]


def open_fds(node: RunningNode) -> int:
    return len(os.listdir(f"/proc/{node.pid}/fd"))


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cells]:
    shared = Cells(tmp_path_factory)
    yield shared
    for nodes, _ in shared.started.values():
        nodes.end()


class Load:
    """Requests of one client, and what each must get."""

    def __init__(self, client: RawClient) -> None:
        self.client = client
        self.wanted: list[Request] = []

    def submit(self, count: int, prompt_tokens: int, num_tokens: int) -> None:
        for _ in range(count):
            number = len(self.wanted)
            prompt = [(number * 7 + place) % 97 for place in range(prompt_tokens + number % 9)]
            self.client.submit(number, prompt, max_tokens=num_tokens)
            self.wanted.append((prompt, num_tokens))

    async def check(self) -> None:
        await self.client.finish(*range(len(self.wanted)))
        for number, (prompt, num_tokens) in enumerate(self.wanted):
            assert [end.reason for end in self.client.ends[number]] == ["length"]
            assert self.client.tokens[number] == expected_stream(prompt, num_tokens)


Order = Callable[[str], Path]


async def in_the_middle(load: Load, order: Order, phase: str, count: int = 12) -> Path:
    """Rounds of requests until the worker has come into the phase, with some of them."""
    file = order(phase)
    while file.exists():
        load.submit(count, 20, 25)
        await load.check()
    return file


async def while_buffered(load: Load, order: Order, role: str) -> Path:
    load.submit(120, 60, 4)
    assert (await load.client.stats())["requests"]["queued"] > 0
    return order("now")


async def while_prefilling(load: Load, order: Order, role: str) -> Path:
    if role != "decode":
        return await in_the_middle(load, order, "prefill")
    load.submit(4, 600, 10)  # ten passes each
    return order("now")


async def while_handing_over(load: Load, order: Order, role: str) -> Path:
    # Mixed workers pull when the others are full.
    return await in_the_middle(load, order, "handoff", 80 if role == "mixed" else 12)


async def while_decoding(load: Load, order: Order, role: str) -> Path:
    if role != "prefill":
        return await in_the_middle(load, order, "decode")
    load.submit(12, 20, 60)
    await load.client.read_until(lambda: len(load.client.tokens) == 12)
    return order("now")


async def while_idle(load: Load, order: Order, role: str) -> Path:
    return order("now")


ENTER: dict[str, Callable[[Load, Order, str], Awaitable[Path]]] = {
    "buffered": while_buffered,
    "prefill": while_prefilling,
    "handoff": while_handing_over,
    "decode": while_decoding,
    "idle": while_idle,
}


async def ready_worker(client: RawClient, role: str) -> dict[str, Any]:
    async with client.tracing():
        while True:
            for worker in (await client.stats())["workers"]:
                if (worker["role"], worker["state"]) == (role, "ready"):
                    return dict(worker)
            await client.worker_news()


async def has_failed(client: RawClient, victim: dict[str, Any]) -> dict[str, Any]:
    """The victim's row once its life is over."""
    async with client.tracing():
        while True:
            worker: dict[str, Any] = (await client.stats())["workers"][victim["index"]]
            if worker["state"] != "ready" or worker["restarts"] > victim["restarts"]:
                return worker
            await client.worker_news()


@pytest.mark.slow
@pytest.mark.repeats
@pytest.mark.parametrize(("layout", "phase", "role", "fault"), FAULTS)
async def test_no_stream_notices(
    cells: Cells, connect: Connect, layout: str, phase: str, role: str, fault: str
) -> None:
    nodes, node = cells.of(layout)
    client = await connect(node)
    cells.num_fds.setdefault(layout, open_fds(node))
    victim = await ready_worker(client, role)
    load = Load(client)
    order = await ENTER[phase](load, lambda at: nodes.order(fault, victim["index"], at), role)
    await load.check()
    while order.exists():
        await client.stats()
    if fault == "slow":
        load.submit(4, 20, 10)
        await load.check()
        worker = (await client.stats())["workers"][victim["index"]]
        assert (worker["state"], worker["restarts"]) == ("ready", victim["restarts"])
        return
    worker = await has_failed(client, victim)
    assert REASONS[fault] in worker["reason"]
    load.submit(4, 20, 10)
    await load.check()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [LAYOUT, ALONE, RANKS])
async def test_nothing_is_left_of_them(cells: Cells, connect: Connect, layout: str) -> None:
    _, node = cells.of(layout)
    client = await connect(node)
    stats = await all_ready(client)
    assert not stats["requests"]["failed"]
    await settled(client)
    assert open_fds(node) <= cells.num_fds.get(layout, math.inf)
    pids = node.worker_pids()
    assert len(pids) == len(stats["workers"]), "one process each, none of an earlier life"
    node.process.terminate()
    assert node.wait() == 0
    assert not names_of(node.pid)
