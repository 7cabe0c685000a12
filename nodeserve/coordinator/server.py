"""A node from start to stop: workers, the socket, the loop.

`serve` blocks until the node has stopped and returns its exit code. Start: resolve, spawn, wait for
every worker, attach pages, listen. Stop: see ending.py; then ask the workers to leave, remove the
socket. A crash in any task of the loop takes the same way down.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvloop

from nodeserve.checkpoint import Checkpoint
from nodeserve.checkpoint import resolve as resolve_checkpoint
from nodeserve.config import EngineConfig
from nodeserve.coordinator.access import access_of
from nodeserve.coordinator.admission import Limits
from nodeserve.coordinator.coordinator import Coordinator
from nodeserve.coordinator.desk import MAX_BACKLOG_BYTES, Desk
from nodeserve.coordinator.ending import Ending
from nodeserve.coordinator.link import WorkerLink
from nodeserve.coordinator.listener import (
    BACKLOG_CONNECTIONS,
    Connection,
    ConnectionLimits,
    bound_socket,
)
from nodeserve.coordinator.placement import Plan, resolve
from nodeserve.coordinator.startup import late_start
from nodeserve.coordinator.stats import how_they_run
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
    Failed,
    FromWorker,
    Loading,
    Mapped,
    PagesAttached,
    Ready,
)

OnEvent = Callable[[StartEvent], None]


def serve(
    config: EngineConfig,
    on_event: OnEvent,
    gpus: Gpus,
    command: Sequence[str] = WORKER_COMMAND,
) -> int:
    """Run a node until it is stopped; its exit code, see ending.py. `gpus`: those it may use."""
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
        self._on_event = on_event
        self._command = command
        self.serving = False  # before that a worker that ends is a start that failed
        self.leaving = False  # after that it is no news

    async def run(self) -> int:
        """The whole life. Typed errors of the start-up leave as exceptions."""
        sweep_stale()
        self.loop = asyncio.get_running_loop()
        self.ending = Ending(self.plan.config.drain_timeout)
        self.attached = asyncio.Event()  # every puller has mapped every pool it may read
        self.ending.listen(lambda drain: self.stop(drain=drain))
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
            self.desk = Desk(
                self.plan, self.checkpoint, self.coordinator, lambda drain: self.stop(drain=drain)
            )
            tasks: list[asyncio.Task[None]] = []
            try:
                await self.start(tasks)
                server = await self.loop.create_unix_server(
                    self.connection, sock=listener, backlog=BACKLOG_CONNECTIONS
                )
                tasks.append(self.guarded(self.desk.pulse.run(), "pulse"))
                self.serving = True
                self._on_event(StartEvent("ready", None, 1, 1, self.plan.config.socket))
                await self.ending.begun.wait()
                await self.ending.drain(self.coordinator)
                server.close()
                await self.ending.say_goodbye(self.coordinator)
            finally:
                self.leaving = True
                await supervisor.stop(self.ending.hurried)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        if self.error is not None:
            logger.error("stopped: %s", self.error)
        return self.ending.code

    @property
    def error(self) -> NodeServeError | None:
        """Why it stops or has stopped, unless it was asked to."""
        return self.ending.error

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
            for link in links:
                self.moved(link, "peers", 0, link.num_unattached)
            await self.or_stopped(asyncio.ensure_future(self.attached.wait()))
        self._on_event(StartEvent("pages", None, 1, 1))
        for note in how_they_run(links):
            self._on_event(StartEvent("note", None, 0, 0, note))

    async def or_stopped(self, work: "asyncio.Future[Any]") -> None:
        """Wait for the workers, a signal to stop, or somebody who is late, as it comes."""
        work.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        stopped = asyncio.ensure_future(self.ending.begun.wait())
        late = asyncio.ensure_future(late_start(self.supervisor.links, time.monotonic))
        done, _ = await asyncio.wait({work, stopped, late}, return_when=asyncio.FIRST_COMPLETED)
        for other in {work, stopped, late} - done:
            other.cancel()
        if work in done:
            work.result()
            return
        if late in done:
            timeout_s = self.plan.startup_timeout_s
            raise WorkerLost(
                f"{late.result()}; give it more time with --startup-timeout ({timeout_s:.0f} s now)"
            )
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
        link.num_received += 1
        if link.alive:
            self.on_running(link, message)
        else:
            self.on_starting(link, message)

    def on_running(self, link: WorkerLink, message: FromWorker) -> None:
        match message:
            case PagesAttached():
                link.num_unattached -= 1
                self.moved(link, "peers", 0, link.num_unattached)
                if not any(other.num_unattached for other in self.supervisor.links):
                    self.attached.set()
            case Failed():
                link.stderr_tail.append(message.message)
            case _:
                self.coordinator.handle(link, message)

    def on_starting(self, link: WorkerLink, message: FromWorker) -> None:
        match message:
            case Mapped():
                link.channel.unlink_names()
                self.moved(link, "import", 0, 1)
            case Loading():
                self.moved(link, *message)
                event = StartEvent(
                    "loading", link.index, message.done, message.total, message.phase
                )
                self._on_event(event)
            case Ready():
                link.is_ready(message)
                self.moved(link, "ready", 0, 0)
                if not link.ready.done():
                    link.ready.set_result(message)
            case Failed():
                if not link.ready.done():
                    link.ready.set_exception(from_code(message.code, message.message))

    @staticmethod
    def moved(link: WorkerLink, phase: str, done: int, total: int) -> None:
        """A worker is further with its start; with nothing left to do it is over."""
        assert link.start is not None, "it has a process"
        link.start.move(phase, done, total, time.monotonic())
        if not total:
            link.start.finish()

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
        return Connection(self.coordinator, self.desk, self.connection_limits)

    @property
    def connection_limits(self) -> ConnectionLimits:
        config = self.plan.config
        return ConnectionLimits(
            self.desk.max_frame_bytes,
            MAX_BACKLOG_BYTES,
            config.max_connections,
            Quota(config.max_connection_reqs, config.max_connection_rate),
            self.access,
        )

    # ---- stop

    def stop(self, *, drain: bool = False, error: NodeServeError | None = None) -> None:
        """Begin to stop; a later call without `drain`, or with an error, cuts a drain short."""
        self.ending.begin(drain=drain, error=error)
        self.coordinator.closes_s = self.ending.deadline_s
