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
from nodeserve.coordinator.intake import Intake
from nodeserve.coordinator.link import WorkerLink
from nodeserve.coordinator.listener import (
    BACKLOG_CONNECTIONS,
    Connection,
    ConnectionLimits,
    bound_socket,
)
from nodeserve.coordinator.placement import Plan, resolve
from nodeserve.coordinator.stats import how_they_run, node_stats
from nodeserve.coordinator.streams import Backlog
from nodeserve.coordinator.supervisor import WORKER_COMMAND, Supervisor, lost
from nodeserve.coordinator.turns import Turns
from nodeserve.errors import (
    NodeServeError,
    ProtocolError,
    RingError,
    ShuttingDown,
    WorkerLost,
    from_code,
)
from nodeserve.gpus import Gpus
from nodeserve.log import logger
from nodeserve.policy.metering import Quota
from nodeserve.types import StartEvent
from nodeserve.wire.channel import sweep_stale
from nodeserve.wire.messages import (
    FROM_WORKER,
    PROTOCOL_VERSION,
    Failed,
    FromWorker,
    Hello,
    Loading,
    Mapped,
    PagesAttached,
    Ready,
    Stats,
)

START_TIMEOUT_S = 900.0  # a large model from a slow disk; people watch the bars meanwhile
DRAIN_TIMEOUT_S = 600.0
MIN_FRAME_LIMIT_BYTES = 4 << 20
MAX_BACKLOG_BYTES = 8 << 20  # of one connection
MAX_BACKLOGS_BYTES = 128 << 20  # of all

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
        self.backlog = Backlog(MAX_BACKLOGS_BYTES)
        self.started_s = time.monotonic()
        self._on_event = on_event
        self._command = command
        self.error: NodeServeError | None = None  # why it stops, unless it was asked to
        self.serving = False  # before that a worker that ends is a start that failed
        self.leaving = False  # after that it is no news

    async def run(self) -> int:
        """The whole life. Typed errors of the start-up leave as exceptions."""
        sweep_stale()
        self.loop = asyncio.get_running_loop()
        self.intake = Intake(self.loop.call_soon)
        self.stopping: asyncio.Future[bool] = self.loop.create_future()  # True: drain first
        self.wound_down = asyncio.Event()  # a drain need not wait any longer
        self.attached = asyncio.Event()  # every puller has mapped every pool it may read
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
            tasks: list[asyncio.Task[None]] = []
            try:
                await self.start(tasks)
                server = await self.loop.create_unix_server(
                    self.connection, sock=listener, backlog=BACKLOG_CONNECTIONS
                )
                self.serving = True
                self._on_event(StartEvent("ready", None, 1, 1, self.plan.config.socket))
                drain = await self.stopping
                server.close()
                await self.wind_down(drain)
            finally:
                self.leaving = True
                await supervisor.stop()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        if self.error is not None:
            logger.error("stopped: %s", self.error)
            return 1
        return 0

    def make_coordinator(self, links: list[WorkerLink]) -> Coordinator:
        config = self.plan.config
        limits = Limits(
            vocab_size=self.checkpoint.config.vocab_size,
            max_model_len=self.plan.max_model_len,
            block_size=config.block_size,
        )
        return Coordinator(links, limits, self.plan.policies, time.monotonic, self.turns.wake)

    # ---- start

    async def start(self, tasks: list[asyncio.Task[None]]) -> None:
        """Spawn, wait until all are ready, map pages. Raises the first failure."""
        links = self.supervisor.links
        self._on_event(StartEvent("workers", None, 0, len(links)))
        await self.supervisor.start()
        tasks.append(self.guarded(self.turns.run(), "turns"))
        for link in links:
            self.loop.add_reader(link.channel.fileno(), link.rung.set)
            tasks.append(self.guarded(self.pump(link), f"pump:{link.index}"))
            tasks.append(self.guarded(self.watch(link), f"watch:{link.index}"))
        await self.or_stopped(asyncio.gather(*(link.ready for link in links)))
        if self.supervisor.attach_pages():
            await self.or_stopped(asyncio.ensure_future(self.attached.wait()))
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

    # ---- run

    async def pump(self, link: WorkerLink) -> None:
        """Carry a worker's records to the coordinator, and what waits for room back to it."""
        while True:
            await link.rung.wait()
            link.rung.clear()  # first, so that no ring is lost
            self.receive(link)

    def receive(self, link: WorkerLink) -> None:
        try:
            messages = [FROM_WORKER.decode(record) for record in link.channel.receive()]
        except (RingError, ProtocolError) as error:
            link.give_up(error)
            return
        for message in messages:
            self.on_record(link, message)

    def on_record(self, link: WorkerLink, message: FromWorker) -> None:
        if link.alive:
            self.on_running(link, message)
        else:
            self.on_starting(link, message)

    def on_running(self, link: WorkerLink, message: FromWorker) -> None:
        match message:
            case PagesAttached():
                self.supervisor.num_unattached -= 1
                if self.supervisor.num_unattached == 0:
                    self.attached.set()
            case Failed():
                link.stderr_tail.append(message.message)
            case _:
                self.coordinator.handle(link, message)

    def on_starting(self, link: WorkerLink, message: FromWorker) -> None:
        match message:
            case Mapped():
                link.channel.unlink_names()
            case Loading():
                event = StartEvent(
                    "loading", link.index, message.done, message.total, message.phase
                )
                self._on_event(event)
            case Ready():
                link.is_ready(message)
                if not link.ready.done():
                    link.ready.set_result(message)
            case Failed():
                if not link.ready.done():
                    link.ready.set_exception(from_code(message.code, message.message))

    async def watch(self, link: WorkerLink) -> None:
        """Act on a worker's end: nobody else may wait for it."""
        how = await self.supervisor.watch(link)
        error = lost(link, how)
        self.receive(link)
        if not link.ready.done():
            link.ready.set_exception(error)
        if self.leaving or not link.alive:
            link.state = "lost"
            return
        logger.error("%s", error)
        self.coordinator.lose(link)
        for mate in self.supervisor.end_instance(link):
            logger.error("%s", lost(mate, "is ended"))
            self.receive(mate)
            self.coordinator.lose(mate)
        alive = [other for other in self.supervisor.links if other.alive]
        covered = any(x.prefills for x in alive) and any(x.decodes for x in alive)
        if not (self.serving and covered):
            self.stop(error=error)

    # ---- clients

    def connection(self) -> Connection:
        return Connection(
            self.coordinator,
            self.welcome(),
            self.stats,
            lambda drain: self.stop(drain=drain),
            self.connection_limits,
            self.intake,
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
            self.backlog,
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
