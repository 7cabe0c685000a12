"""A node whose workers are listened to: each pass and each handoff, as it is reported.

It is the real server, on a socket of its own, with its workers' processes; nothing is imitated, and
nothing is added but an ear. The load comes over the socket, from the same event loop.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import uvloop

from nodeserve.checkpoint import Checkpoint
from nodeserve.client import AsyncClient
from nodeserve.config import EngineConfig
from nodeserve.coordinator.link import WorkerLink
from nodeserve.coordinator.placement import Plan, resolve
from nodeserve.coordinator.server import OnEvent, Server
from nodeserve.coordinator.supervisor import WORKER_COMMAND
from nodeserve.errors import ShuttingDown
from nodeserve.gpus import Gpus
from nodeserve.types import StartEvent
from nodeserve.wire.messages import FromWorker, KvPulled, StepDone

Result = TypeVar("Result")


class HeardServer(Server):
    """Keeps what its workers say of passes and handoffs, in the order of its coming."""

    steps: list[tuple[int, StepDone]]  # worker, and its pass
    pulls: list[KvPulled]

    def on_running(self, link: WorkerLink, message: FromWorker) -> None:
        if isinstance(message, StepDone):
            self.steps.append((link.index, message))
        elif isinstance(message, KvPulled):
            self.pulls.append(message)
        super().on_running(link, message)


class Node:
    """A running node: a client, and what was heard since it was last asked."""

    def __init__(self, server: HeardServer, client: AsyncClient) -> None:
        self._server = server
        self.client = client

    @property
    def plan(self) -> Plan:
        return self._server.plan

    @property
    def num_kv_tokens(self) -> int:
        """That the smallest pool of a worker holds."""
        infos = [link.info for link in self._server.supervisor.links]
        return min(one.num_blocks for one in infos if one) * self.plan.config.block_size

    @property
    def block_bytes(self) -> int:
        infos = [link.info for link in self._server.supervisor.links]
        return max(one.block_bytes for one in infos if one)

    @property
    def kernels(self) -> str:
        """Which ones the workers run."""
        infos = [link.info for link in self._server.supervisor.links]
        return next(one.kernels for one in infos if one)

    def heard(self) -> tuple[list[tuple[int, StepDone]], list[KvPulled]]:
        """Passes with their worker, and handoffs, since the last time."""
        found = self._server.steps, self._server.pulls
        self._server.steps, self._server.pulls = [], []
        return found


def with_node(
    config: EngineConfig,
    checkpoint: Checkpoint,
    gpus: Gpus,
    on_event: OnEvent,
    work: Callable[[Node], Awaitable[Result]],
) -> Result:
    """Start a node, do `work` with it, stop it. Typed errors of a failed start leave as such."""

    async def run() -> Result:
        with tempfile.TemporaryDirectory(prefix="nodeserve-") as folder:
            path = str(Path(folder) / "profile.sock")
            async with _running(replace(config, socket=path), checkpoint, gpus, on_event) as node:
                return await work(node)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


@asynccontextmanager
async def _running(
    config: EngineConfig, checkpoint: Checkpoint, gpus: Gpus, on_event: OnEvent
) -> AsyncIterator[Node]:
    ready = asyncio.Event()

    def heard(event: StartEvent) -> None:
        if event.phase == "ready":
            ready.set()
        else:
            on_event(event)

    server = HeardServer(resolve(config, checkpoint, gpus), checkpoint, heard, WORKER_COMMAND)
    server.steps, server.pulls = [], []
    running = asyncio.ensure_future(server.run())
    waiting = asyncio.ensure_future(ready.wait())
    try:
        await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
            raise server.error or ShuttingDown("stopped while starting")
        assert config.socket is not None
        async with AsyncClient(config.socket) as client:
            yield Node(server, client)
    finally:
        waiting.cancel()
        if not running.done():
            server.stop()
            await running
