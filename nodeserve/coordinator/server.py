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
from nodeserve.coordinator.fleet import Fleet
from nodeserve.coordinator.intake import Intake
from nodeserve.coordinator.janitor import janitor
from nodeserve.coordinator.link import WorkerLink
from nodeserve.coordinator.listener import (
    BACKLOG_CONNECTIONS,
    Connection,
    ConnectionLimits,
    bound_socket,
)
from nodeserve.coordinator.placement import Plan, resolve
from nodeserve.coordinator.stats import how_they_run
from nodeserve.coordinator.streams import Backlog
from nodeserve.coordinator.supervisor import WORKER_COMMAND, Supervisor
from nodeserve.coordinator.turns import Turns
from nodeserve.errors import (
    NodeServeError,
    ShuttingDown,
)
from nodeserve.gpus import Gpus
from nodeserve.log import about, logger
from nodeserve.policy.metering import Quota
from nodeserve.types import StartEvent
from nodeserve.wire.channel import sweep_stale
from nodeserve.wire.messages import ExpertsCounted, FromWorker

MAX_BACKLOGS_BYTES = 128 << 20  # of all connections
MAX_INCOMING_BYTES = 64 << 20  # of frames that are not complete, of all connections

OnEvent = Callable[[StartEvent], None]


def serve(
    config: EngineConfig,
    on_event: OnEvent,
    gpus: Gpus,
    command: Sequence[str] = WORKER_COMMAND,
) -> int:
    """Run a node until it is stopped; its exit code, see ending.py. `gpus`: those it may use."""
    on_event(StartEvent("model", None, 0, 1, config.model or "embedded demo model"))
    checkpoint = resolve_checkpoint(config.model, config.load_format, config.model_impl)
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
        self.incoming = Backlog(MAX_INCOMING_BYTES)
        self._on_event = on_event
        self._command = command

    async def run(self) -> int:
        """The whole life. Typed errors of the start-up leave as exceptions."""
        sweep_stale()
        self.loop = asyncio.get_running_loop()
        self.intake = Intake(self.loop.call_soon)
        self.ending = Ending(self.plan.config.drain_timeout)
        self.ending.listen(lambda drain: self.stop(drain=drain))
        assert self.plan.config.socket is not None
        with (
            bound_socket(Path(self.plan.config.socket), self.access) as listener,
            janitor(Path(self.plan.config.socket)),
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
            self.fleet = Fleet(
                *(self.plan, supervisor, self.coordinator, self._on_event),
                handle=self.on_running,
                begin=self.guarded,
                fail=lambda error: self.stop(error=error),
            )
            tasks = [self.guarded(self.turns.run(), "turns")]
            try:
                await self.start()
                server = await self.loop.create_unix_server(
                    self.connection, sock=listener, backlog=BACKLOG_CONNECTIONS
                )
                tasks.append(self.guarded(self.desk.pulse.run(), "pulse"))
                self.fleet.serve()
                self.coordinator.ledger.begin(time.monotonic())
                self._on_event(StartEvent("ready", None, 1, 1, self.plan.config.socket))
                await self.ending.begun.wait()
                await self.ending.drain(self.coordinator)
                server.close()
                await self.ending.say_goodbye(self.coordinator)
                self.coordinator.tally.tell()
            finally:
                self.fleet.leave()
                await supervisor.stop(self.ending.hurried)
                await self.fleet.close()
                for task in tasks:
                    task.cancel()
        self.ending.failed = bool(self.fleet.taken_out)
        if self.error is not None:
            logger.error("stopped: %s", self.error, extra=about("error", code=self.error.code))
        for instance in self.fleet.taken_out:
            extra = about("taken_out", instance=instance)
            logger.error("instance %d was taken out, see above", instance, extra=extra)
        code = self.ending.code
        logger.info("stopped with exit code %d", code, extra=about("stopped", exit_code=code))
        return code

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

    async def start(self) -> None:
        """Spawn, wait until all are ready, map pages. Raises the first failure."""
        links = self.supervisor.links
        self._on_event(StartEvent("workers", None, 0, len(links)))
        await self.or_stopped(asyncio.ensure_future(self.fleet.start()))
        self._on_event(StartEvent("pages", None, 1, 1))
        for note in how_they_run(links):
            self._on_event(StartEvent("note", None, 0, 0, note))

    async def or_stopped(self, work: "asyncio.Future[Any]") -> None:
        """Wait for the workers, or a signal to stop, whichever comes first."""
        work.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        stopped = asyncio.ensure_future(self.ending.begun.wait())
        done, _ = await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if work in done:
            work.result()
            return
        work.cancel()
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
        if isinstance(message, ExpertsCounted):
            self.desk.expert_survey.counted(link, message)
        else:
            self.coordinator.handle(link, message)

    # ---- clients

    def connection(self) -> Connection:
        return Connection(self.coordinator, self.desk, self.connection_limits, self.intake)

    @property
    def connection_limits(self) -> ConnectionLimits:
        config = self.plan.config
        return ConnectionLimits(
            self.desk.max_frame_bytes,
            MAX_BACKLOG_BYTES,
            config.max_connections,
            Quota(config.max_connection_reqs, config.max_connection_rate),
            self.access,
            self.backlog,
            self.incoming,
        )

    # ---- stop

    def stop(self, *, drain: bool = False, error: NodeServeError | None = None) -> None:
        """Begin to stop; a later call without `drain`, or with an error, cuts a drain short."""
        if not self.ending.begun.is_set():
            count = len(self.coordinator.requests)
            words = "draining" if drain else "stopping"
            extra = about(words, requests=count)
            logger.info("%s; requests that have not ended: %d", words, count, extra=extra)
        self.ending.begin(drain=drain, error=error)
        self.coordinator.closes_s = self.ending.deadline_s
