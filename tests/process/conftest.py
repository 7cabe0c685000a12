"""Running nodes for the process tests, ended by id whatever happens."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from nodeserve.client import Client
from nodeserve.errors import NodeServeError
from tests.fakes.faults import FOLDER
from tests.fakes.gateway_process import COMMAND, Gateways
from tests.fakes.gguf_writer import gpt2_metadata, write_gguf
from tests.fakes.raw_client import RawClient
from tests.patience import PATIENCE_S


class RunningNode:
    """A node process and where it listens."""

    def __init__(self, process: "subprocess.Popen[str]", socket: Path) -> None:
        self.process = process
        self.socket = socket
        self.is_ready = False

    @property
    def pid(self) -> int:
        return self.process.pid

    def worker_pids(self) -> list[int]:
        return [pid for pid in self.children() if not is_janitor(pid)]

    def janitor_pid(self) -> int:
        return next(pid for pid in self.children() if is_janitor(pid))

    def children(self) -> list[int]:
        path = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def wait(self) -> int:
        return self.process.wait(timeout=PATIENCE_S)


def is_janitor(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return b"nodeserve.coordinator.janitor" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


class Nodes:
    """Starts nodes; `start` returns when one is ready."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: list[RunningNode] = []

    def order(self, fault: str, worker: int, phase: str) -> Path:
        """A fault of that worker (tests/fakes/faults.py). The file goes when it happens."""
        order = self.folder / f"{worker}.{phase}"
        written = order.with_suffix(".new")
        written.write_text(fault)
        return written.rename(order)

    def spawn(self, socket: Path | None = None, **settings: Any) -> RunningNode:
        socket = socket or self.folder / f"node{len(self.running)}.sock"
        arguments = json.dumps({"socket": str(socket), **settings})
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.node_process", arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, FOLDER: str(self.folder)},
        )
        node = RunningNode(process, socket)
        self.running.append(node)
        return node

    def start(self, **settings: Any) -> RunningNode:
        node = self.spawn(**settings)
        assert node.process.stdout is not None
        line = node.process.stdout.readline()
        assert line == "ready\n", f"the node did not start: {node.process.communicate()}"
        node.is_ready = True
        return node

    def end(self) -> None:
        """All that still run."""
        for node in self.running:
            if node.process.poll() is None:
                node.process.terminate()
            try:
                node.process.communicate(timeout=PATIENCE_S)
            except subprocess.TimeoutExpired:
                node.process.kill()
                node.process.communicate()


def audit(node: RunningNode) -> tuple[str, ...]:
    """After every test: blocks, requests and records of a node that still runs add up."""
    if not node.is_ready or node.process.poll() is not None or not node.socket.exists():
        return ()  # or it is about to end, or its folder went before it
    try:
        with Client(node.socket, connect_timeout_s=PATIENCE_S) as client:
            return client.audit().problems
    except NodeServeError as error:
        # No problem if it was stopping.
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.wait()
            return ()
        return (str(error),)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    started = Nodes(tmp_path)
    yield started
    problems = [problem for node in started.running for problem in audit(node)]
    started.end()
    assert not problems


class Connect(Protocol):
    """Opens a connection to a node."""

    async def __call__(self, node: RunningNode, limit_bytes: int = ...) -> RawClient: ...


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Opens connections to nodes, closed at the end of the test."""
    clients: list[RawClient] = []

    async def open_one(node: RunningNode, limit_bytes: int = 1 << 16) -> RawClient:
        clients.append(await RawClient.connect(node.socket, limit_bytes))
        return clients[-1]

    yield open_one
    for client in clients:
        await client.close()


def names_of(pid: int) -> list[str]:
    """What a coordinator with this pid has left in /dev/shm."""
    return [name for name in os.listdir("/dev/shm") if f"nodeserve-{pid}-" in name]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model.gguf", gpt2_metadata())


@pytest.fixture
def text_node(nodes: Nodes, tokenizer: Path) -> RunningNode:
    """Simulated GPUs, and a tokenizer for clients."""
    return nodes.start(layout="1p1d", device="sim", tokenizer=str(tokenizer))


StartGateways = Callable[..., Gateways]


@pytest.fixture
def start_gateways(text_node: RunningNode) -> Iterator[StartGateways]:
    """Starts gateways of the node; they are ended with the test."""
    started: list[Gateways] = []

    def start(*options: str) -> Gateways:
        command = [*COMMAND, "--socket", str(text_node.socket), *options]
        started.append(Gateways(subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
        return started[-1]

    yield start
    for gateways in started:
        if gateways.process.poll() is None:
            gateways.process.terminate()
        gateways.process.communicate(timeout=PATIENCE_S)
