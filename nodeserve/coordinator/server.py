"""A node from start to stop: workers, the socket, the loop, and the way down.

`serve` blocks until the node has stopped and returns its exit code. Start: resolve, spawn, wait for
every worker, attach pages, listen. Stop: refuse new requests, finish or end the running ones, ask
the workers to leave, remove the socket. A crash in any task of the loop takes the same way down.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvloop

from nodeserve import __version__
from nodeserve.checkpoint import Checkpoint
from nodeserve.checkpoint import resolve as resolve_checkpoint
from nodeserve.config import EngineConfig
from nodeserve.coordinator.access import access_of
from nodeserve.coordinator.admission import Limits
from nodeserve.coordinator.coordinator import Coordinator
from nodeserve.coordinator.fleet import Fleet
from nodeserve.coordinator.link import WorkerLink
from nodeserve.coordinator.listener import (
    BACKLOG_CONNECTIONS,
    Connection,
    ConnectionLimits,
    bound_socket,
)
from nodeserve.coordinator.placement import Plan, resolve
from nodeserve.coordinator.stats import how_they_run, node_stats
from nodeserve.coordinator.supervisor import WORKER_COMMAND, Supervisor
from nodeserve.coordinator.turns import Turns
from nodeserve.errors import (
    NodeServeError,
    ShuttingDown,
    WorkerLost,
)
from nodeserve.gpus import Gpus
from nodeserve.log import logger
from nodeserve.policy.metering import Quota
from nodeserve.types import StartEvent
from nodeserve.wire.channel import sweep_stale
from nodeserve.wire.messages import PROTOCOL_VERSION, FromWorker, Hello, Stats

START_TIMEOUT_S = 900.0  # a large model from a slow disk; people watch the bars meanwhile
DRAIN_TIMEOUT_S = 600.0
MIN_FRAME_LIMIT_BYTES = 4 << 20
MAX_BACKLOG_BYTES = 8 << 20

OnEvent = Callable[[StartEvent], None]


def serve(
    config: EngineConfig,
    on_event: OnEvent,
    gpus: Gpus,
    command: Sequence[str] = WORKER_COMMAND,
) -> int:
    """Run a node until it is stopped; 0 after a stop that was asked for, 1 after a failure.

    gpus: those it may use.
    """
    on_event(StartEvent("model", None, 0, 1, config.model or "embedded demo model"))
    checkpoint = resolve_checkpoint(config.model, config.load_format)
    plan = resolve(config, checkpoint, gpus)
    on_event(StartEvent("model", None, 1, 1, plan.config.served_model_name or ""))
    for note in plan.notes:
        on_event(StartEvent("note", None, 0, 0, note))
    server = Server(plan, checkpoint, on_event, command)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(server.run())


class Server:
    """One node's run."""

    def __init__(
        self, plan: Plan, checkpoint: Checkpoint, on_event: OnEvent, command: Sequence[str]
    ) -> None:
        self.plan = plan
        self.checkpoint = checkpoint
        self.access = access_of(plan.config)
        self.started_s = time.monotonic()
        self._on_event = on_event
        self._command = command
        self.error: NodeServeError | None = None  # why it stops, unless it was asked to

    async def run(self) -> int:
        """The whole life. Typed errors of the start-up leave as exceptions."""
        sweep_stale()
        self.loop = asyncio.get_running_loop()
        self.stopping: asyncio.Future[bool] = self.loop.create_future()  # True: drain first
        self.wound_down = asyncio.Event()  # a drain need not wait any longer
        self.listen_signals()
        assert self.plan.config.socket is not None
        with (
            bound_socket(Path(self.plan.config.socket), self.access) as listener,
            Supervisor(
                self.plan, str(self.checkpoint.path), secrets.token_hex(4), self._command
            ) as supervisor,
        ):
            self.supervisor = supervisor
            self.turns = Turns(time.monotonic, lambda earliest_s: self.coordinator.turn(earliest_s))
            self.coordinator = self.make_coordinator(supervisor.links)
            self.fleet = Fleet(
                *(self.plan, supervisor, self.coordinator, self._on_event),
                handle=self.on_running,
                begin=self.guarded,
                fail=lambda error: self.stop(error=error),
            )
            turns = self.guarded(self.turns.run(), "turns")
            try:
                await self.start()
                server = await self.loop.create_unix_server(
                    self.connection, sock=listener, backlog=BACKLOG_CONNECTIONS
                )
                self.fleet.serve()
                self._on_event(StartEvent("ready", None, 1, 1, self.plan.config.socket))
                drain = await self.stopping
                server.close()
                await self.wind_down(drain)
            finally:
                self.fleet.leave()
                await supervisor.stop()
                await self.fleet.close()
                turns.cancel()
        if self.error is not None:
            logger.error("stopped: %s", self.error)
        for instance in self.fleet.taken_out:
            logger.error("instance %d was taken out, see above", instance)
        return 1 if self.error is not None or self.fleet.taken_out else 0

    def make_coordinator(self, links: list[WorkerLink]) -> Coordinator:
        config = self.plan.config
        limits = Limits(
            vocab_size=self.checkpoint.config.vocab_size,
            max_model_len=self.plan.max_model_len,
            block_size=config.block_size,
        )
        return Coordinator(links, limits, self.plan.policies, time.monotonic, self.turns.wake)

    # ---- start

    async def start(self) -> None:
        """Spawn, wait until all are ready, map pages. Raises the first failure."""
        links = self.supervisor.links
        self._on_event(StartEvent("workers", None, 0, len(links)))
        await self.or_stopped(asyncio.ensure_future(self.fleet.start()))
        self._on_event(StartEvent("pages", None, 1, 1))
        for note in how_they_run(links):
            self._on_event(StartEvent("note", None, 0, 0, note))

    async def or_stopped(self, work: "asyncio.Future[Any]") -> None:
        """Wait for the workers, a signal to stop, or the deadline, whichever comes first."""
        work.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        done, _ = await asyncio.wait(
            {work, self.stopping}, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        if work in done:
            work.result()
            return
        work.cancel()
        if not done:
            late = [str(link.index) for link in self.supervisor.links if not link.alive]
            raise WorkerLost(f"workers {', '.join(late)} were not ready in {START_TIMEOUT_S:.0f} s")
        raise self.error or ShuttingDown("stopped while starting")

    def guarded(self, work: "asyncio._CoroutineLike[None]", name: str) -> asyncio.Task[None]:
        """A background task whose crash stops the node loudly."""
        task = self.loop.create_task(work, name=name)
        task.add_done_callback(self.on_task_done)
        return task

    def on_task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (problem := task.exception()) is not None:
            logger.error("%s crashed", task.get_name(), exc_info=problem)
            self.stop(error=NodeServeError(f"{task.get_name()} crashed: {problem!r}"))

    def on_running(self, link: WorkerLink, message: FromWorker) -> None:
        """What a worker that runs has to say."""
        self.coordinator.handle(link, message)

    # ---- clients

    def connection(self) -> Connection:
        return Connection(
            self.coordinator,
            self.welcome(),
            self.stats,
            lambda drain: self.stop(drain=drain),
            self.connection_limits,
        )

    @property
    def connection_limits(self) -> ConnectionLimits:
        config = self.plan.config
        return ConnectionLimits(
            self.max_frame_bytes,
            MAX_BACKLOG_BYTES,
            config.max_connections,
            Quota(config.max_connection_reqs, config.max_connection_rate),
            self.access,
        )

    @property
    def max_frame_bytes(self) -> int:
        return max(MIN_FRAME_LIMIT_BYTES, 8 * self.plan.max_model_len)

    def welcome(self) -> Hello:
        config, model = self.plan.config, self.checkpoint.config
        server = {
            "model": config.served_model_name,
            "tokenizer": str(self.checkpoint.path),
            "max_model_len": self.plan.max_model_len,
            "vocab_size": model.vocab_size,
            "eos_token_ids": list(model.eos_token_ids),
            "max_frame_bytes": self.max_frame_bytes,
            "max_backlog_bytes": MAX_BACKLOG_BYTES,
            "block_size": config.block_size,
            "layout": config.layout,
            "pid": os.getpid(),
            "version": __version__,
        }
        return Hello(PROTOCOL_VERSION, server)

    def stats(self) -> Stats:
        now = time.monotonic()
        config = self.plan.config
        return Stats(
            {
                "model": config.served_model_name,
                "layout": config.layout,
                "pid": os.getpid(),
                "uptime_s": now - self.started_s,
                **node_stats(self.coordinator, now),
            }
        )

    # ---- stop

    def listen_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.loop.add_signal_handler(number, self.on_signal)

    def on_signal(self) -> None:
        """A signal does not wait for running requests, also when a drain is under way."""
        self.stop()

    def stop(self, *, drain: bool = False, error: NodeServeError | None = None) -> None:
        """Begin to stop; a later call without `drain`, or with an error, cuts a drain short."""
        self.coordinator.closing = True
        self.error = self.error or error
        if not self.stopping.done():
            self.stopping.set_result(drain)
        elif not drain:
            self.wound_down.set()

    async def wind_down(self, drain: bool) -> None:
        """Finish or end what runs, then say goodbye on every connection."""
        coordinator = self.coordinator
        if drain and coordinator.requests:
            coordinator.on_idle = self.wound_down.set
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_TIMEOUT_S):
                    await self.wound_down.wait()
        reason = self.error or ShuttingDown("the server was stopped")
        coordinator.end_all(reason)
        coordinator.flush()
        for stream in list(coordinator.streams):
            stream.goodbye(reason.code, str(reason))
