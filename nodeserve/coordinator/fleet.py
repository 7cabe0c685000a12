"""The workers of a node over all their lives: started, heard, watched, ended, started again.

A link is one life of one worker, and `links` has the present ones. The ranks of an instance live
and die together: a pass needs all of them. Always true:

- A life is over when the worker's process has ended or was sent SIGKILL, never before: silence,
  nonsense in a ring or a failed send end it by sending that. From then on nothing of it is taken.
- The coordinator has given back what an instance held, and peers were told to unmap its pages,
  before anything of its next life begins; that begins when all its processes have ended; and it
  gets requests when every peer that may read its pages, or whose pages it may read, has said so.
- A worker that fails does nothing to the others: whatever it does is about its own link.

How often and when an instance is started again: policy/restarts.py. What counts as hung:
policy/watchdog.py.
"""

import asyncio
import time
from asyncio import FIRST_COMPLETED
from collections.abc import Callable, Iterable, Sequence

from nodeserve.coordinator.coordinator import Coordinator
from nodeserve.coordinator.link import RESTARTING, TAKEN_OUT, WorkerLink
from nodeserve.coordinator.placement import Plan
from nodeserve.coordinator.records import message_of
from nodeserve.coordinator.startup import late_ones
from nodeserve.coordinator.supervisor import Supervisor
from nodeserve.errors import ConfigError, NodeServeError, WorkerLost, from_code
from nodeserve.log import about, logger
from nodeserve.policy.restarts import Restarts
from nodeserve.types import Role, StartEvent
from nodeserve.wire.messages import (
    DetachPages,
    Failed,
    FromWorker,
    KvPulled,
    KvReady,
    Loading,
    Mapped,
    PagesAttached,
    Ready,
    StepDone,
)

LOOKS = 8  # at every worker in the time that makes one hung
LONGEST_LOOK_S = 1.0
CAUSE_S = 0.5  # for the reason of an end that another worker has noticed
Start = Callable[["asyncio._CoroutineLike[None]", str], asyncio.Task[None]]


class Fleet:
    """Starts, hears and watches. `handle` takes what a running worker says; `begin` runs a
    background task whose crash stops the node, `fail` stops it with an error: nobody is left."""

    def __init__(
        self,
        plan: Plan,
        supervisor: Supervisor,
        coordinator: Coordinator,
        on_event: Callable[[StartEvent], None],
        handle: Callable[[WorkerLink, FromWorker], None],
        begin: Start,
        fail: Callable[[NodeServeError], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.links = supervisor.links
        self.taken_out: list[int] = []  # instances
        self._plan = plan
        self._supervisor = supervisor
        self._coordinator = coordinator
        self._on_event = on_event
        self._handle = handle
        self._begin = begin
        self._fail = fail
        self._clock = clock
        self._pumps: dict[int, asyncio.Task[None]] = {}  # by worker
        self._tasks: set[asyncio.Task[None]] = set()
        self._keepers: list[asyncio.Task[None]] = []

    # ---- a node's life

    async def start(self) -> None:
        """Spawn all, wait until they are ready and have mapped each other's pages. Raises the first
        failure: until the node serves, no death is survived."""
        await self._supervisor.spawn(self.links)
        for link in self.links:
            self._follow(link)
        up = asyncio.ensure_future(self._bring_up(self.links))
        died = asyncio.ensure_future(first_death(self.links))
        late = asyncio.ensure_future(late_ones(self.links, self._clock))
        try:
            await asyncio.wait({up, died, late}, return_when=FIRST_COMPLETED)
            if died.done():
                raise died.result()
            if not up.done():
                raise self._too_late(late.result())
            up.result()
        finally:
            for task in (up, died, late):
                task.cancel()

    def serve(self) -> None:
        """From now on who dies is started again, and who hangs is ended."""
        for instance in sorted({link.instance for link in self.links}):
            self._keepers.append(self._begin(self._keep(instance), f"keep:{instance}"))
        self._keepers.append(self._begin(self._guard(), "guard"))

    def leave(self) -> None:
        """The node stops: who ends now is no news."""
        for task in self._keepers:
            task.cancel()

    async def close(self) -> None:
        """No worker is left."""
        tasks = [*self._keepers, *self._tasks, *self._pumps.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- what workers say

    def _follow(self, link: WorkerLink) -> None:
        asyncio.get_running_loop().add_reader(link.channel.fileno(), link.rung.set)
        self._pumps[link.index] = self._begin(self._pump(link), f"pump:{link.index}")
        watch = self._begin(self._watch(link), f"watch:{link.index}")
        self._tasks.add(watch)
        watch.add_done_callback(self._tasks.discard)

    def _unfollow(self, link: WorkerLink) -> None:
        """Before its channel is closed."""
        if pump := self._pumps.pop(link.index, None):
            pump.cancel()
            asyncio.get_running_loop().remove_reader(link.channel.fileno())

    async def _pump(self, link: WorkerLink) -> None:
        """Carry a worker's records to the coordinator, and what waits for room back to it, until
        its life is over: a bell that nobody answers would keep the loop awake."""
        while not link.death.done():
            await link.rung.wait()
            link.rung.clear()  # first, so that no ring is lost
            self._receive(link)
        asyncio.get_running_loop().remove_reader(link.channel.fileno())

    async def _watch(self, link: WorkerLink) -> None:
        """Its process's end is the end of this life, whatever it is in the middle of."""
        how = await self._supervisor.watch(link)
        while self._receive(link):
            pass  # the ring holds more than one look takes
        last = f": {link.stderr_tail[-1]}" if link.stderr_tail else ""
        link.end(link.lost(how + last))

    def _moved(self, link: WorkerLink, phase: str, done: int, total: int) -> None:
        """A worker is further with its start; with nothing left to do it is where it should be."""
        assert link.start is not None, "it has a process"
        link.start.move(phase, done, total, self._clock())
        if not total:
            link.start.finish()

    def _too_late(self, links: Iterable[WorkerLink]) -> WorkerLost:
        words = "; ".join(str(link.lost(self._lateness(link))) for link in links)
        timeout_s = self._plan.startup_timeout_s
        return WorkerLost(f"{words}; give it more time with --startup-timeout ({timeout_s:.0f} s)")

    def _lateness(self, link: WorkerLink) -> str:
        assert link.start is not None
        return f"is late with its start: {link.start.describe(self._clock())}"

    def _receive(self, link: WorkerLink) -> bool:
        """Take in what it sent, unless its life is over; False: nothing came. Nonsense, and what it
        cannot have to say, end it, and so does what meets a bug of ours: nothing that a worker
        sends may end the coordinator."""
        if link.death.done():
            return False
        records: list[bytes] = []
        try:
            records = link.channel.receive()
            for record in records:
                self._on_record(link, message_of(record))
        except NodeServeError as error:
            link.give_up(f"sent what cannot be: {error}")
        except Exception as problem:  # noqa: BLE001  # a check is missing: that worker pays for it
            logger.exception("a record of worker %d could not be carried out", link.index)
            link.give_up(f"sent what could not be carried out: {problem!r}")
        return bool(records)

    def _on_record(self, link: WorkerLink, message: FromWorker) -> None:
        link.num_received += 1
        if isinstance(message, Failed):
            self._on_failed(link, message)
        elif link.alive:
            self._on_running(link, message)
        else:
            self._on_starting(link, message)

    def _on_failed(self, link: WorkerLink, message: Failed) -> None:
        """It says itself that it cannot go on, and is not asked how long its end may take. If it
        tells of the end of another one, that one's own reason should come first."""
        if message.code == WorkerLost.code:
            words = f"failed: {message.message}"
            asyncio.get_running_loop().call_later(CAUSE_S, link.give_up, words)
            return
        if not link.alive:  # a start that fails says what a person has to change
            link.end(from_code(message.code, message.message))
        link.give_up(f"failed: {message.message}")

    def _on_running(self, link: WorkerLink, message: FromWorker) -> None:
        match message:
            case PagesAttached():
                link.has_attached(message.worker)
                self._moved(link, "peers", 0, len(link.attaching))
                return
            case StepDone():
                num_tokens = message.num_prefill_tokens + message.num_decodes
                for member in self._team(link):  # how long a step may take holds for all of them
                    member.watchdog.stepped(num_tokens, message.step_s)
            case KvPulled() | KvReady():
                link.watchdog.progressed()
        self._handle(link, message)

    def _on_starting(self, link: WorkerLink, message: FromWorker) -> None:
        match message:
            case Mapped():
                link.mapped = True
                if all(member.mapped for member in self._team(link)):
                    for member in self._team(link):
                        member.channel.unlink_names()
                self._moved(link, "import", 0, 1)
            case Loading(phase, done, total):
                self._moved(link, phase, done, total)
                self._on_event(StartEvent("loading", link.index, done, total, phase))
            case Ready():
                link.is_ready(message)
                self._moved(link, "ready", 0, 0)
                link.ready.set_result(message)

    # ---- one instance, life after life

    async def _keep(self, instance: int) -> None:
        """Its lives, one after the other, until it is taken out."""
        restarts = Restarts(self._plan.policies.restarts)
        error = await first_death(self._ranks(instance))
        while True:
            self._bury(instance, error)
            wait_s = restarts.died(self._clock())
            if wait_s is None:
                self._take_out(instance, error)
                return
            await self._back_off(instance, wait_s)
            error = await self._live_again(instance)

    def _bury(self, instance: int, error: NodeServeError) -> None:
        """This life is over, and with it that of the other ranks. What it held is given back."""
        logger.error("%s", error, extra=about("instance_lost", instance=instance))
        ranks = self._ranks(instance)
        for link in ranks:
            link.give_up("is ended with its instance")
            link.reason = str(error)
            self._coordinator.lose(link)
            for waiting in link.attaching.values():
                waiting.set_result(None)  # nobody needs to wait for it
            link.attaching.clear()
        for reader, owner in self._readers(ranks):
            if owner in ranks:
                reader.send(DetachPages(owner.index))

    async def _back_off(self, instance: int, wait_s: float) -> None:
        """Until the next life may begin."""
        ranks = self._ranks(instance)
        for link in ranks:
            link.state, link.restart_at_s = RESTARTING, self._clock() + wait_s
        extra = about("instance_restarts", instance=instance, wait_s=wait_s)
        logger.warning("instance %d starts again in %.1f s", instance, wait_s, extra=extra)
        await asyncio.sleep(wait_s)
        for link in ranks:
            if link.process is not None:
                await link.process.wait()  # it may take the system a while to end it

    async def _live_again(self, instance: int) -> NodeServeError:
        """The next life, from its first step to the error that ends it."""
        for link in self._ranks(instance):
            self._unfollow(link)
        try:
            ranks = self._supervisor.renew(instance)
            await self._supervisor.spawn(ranks)
        except ConfigError as error:
            return error
        for link in ranks:
            self._follow(link)
        died = asyncio.ensure_future(first_death(ranks))
        up = asyncio.ensure_future(self._bring_up(ranks))
        late = asyncio.ensure_future(late_ones(ranks, self._clock))
        try:
            await asyncio.wait({died, up, late}, return_when=FIRST_COMPLETED)
            if late.done():
                for link in late.result():
                    link.give_up(self._lateness(link))
            elif not any(link.death.done() for link in ranks):
                up.result()
                self._coordinator.join(ranks)
                extra = about("instance_back", instance=instance)
                logger.warning("instance %d is back", instance, extra=extra)
            return await died
        finally:
            for task in (died, up, late):
                task.cancel()

    def _take_out(self, instance: int, error: NodeServeError) -> None:
        """It dies too often."""
        extra = about("instance_taken_out", instance=instance)
        logger.error("instance %d is taken out, it ended too often", instance, extra=extra)
        self.taken_out.append(instance)
        for link in self._ranks(instance):
            link.state = TAKEN_OUT
        if all(link.state == TAKEN_OUT for link in self.links):
            self._fail(error)

    # ---- pages

    async def _bring_up(self, ranks: Sequence[WorkerLink]) -> None:
        """Returns when these are ready and all pages are mapped that these may read, or that others
        may read of these."""
        await asyncio.wait([link.ready for link in ranks])  # a gather's end would end them too
        waiting = [reader.attach(owner) for reader, owner in self._readers(ranks) if owner.alive]
        for link in self.links:
            if link.attaching:
                self._moved(link, "peers", 0, len(link.attaching))
        if waiting:
            await asyncio.wait(waiting)

    def _readers(self, ranks: Sequence[WorkerLink]) -> list[tuple[WorkerLink, WorkerLink]]:
        """Who pulls from whom, where one of the two is of `ranks`: living readers, and owners that
        have pages."""
        return [
            (reader, owner)
            for reader in self.links
            for owner in self.links
            if (reader in ranks or owner in ranks)
            and (reader.alive and reader.pulls)
            and (owner.role is Role.PREFILL and owner.info is not None)
        ]

    # ---- hangs

    async def _guard(self) -> None:
        """End the workers that hang."""
        timeout_s = self._plan.policies.step_timeout_s
        every_s = min(LONGEST_LOOK_S, LONGEST_LOOK_S if timeout_s is None else timeout_s / LOOKS)
        looked_s = self._clock()
        while True:
            await asyncio.sleep(every_s)
            last_s, looked_s = looked_s, self._clock()
            elapsed_s = min(looked_s - last_s, 2 * every_s)  # more: it was us who stood still
            for link in self.links:
                if link.alive:
                    self._look_at(link, elapsed_s)

    def _look_at(self, link: WorkerLink, elapsed_s: float) -> None:
        plan = self._plan
        most_tokens = plan.max_num_batched_tokens if link.prefills else plan.max_num_seqs
        beats = link.channel.outbox.beats
        words = link.watchdog.look(beats, link.busy, elapsed_s, most_tokens)
        if words is not None:
            link.give_up(words + self._beside(link))
        elif link.watchdog.silent_s > 2 * elapsed_s:
            link.channel.nudge()

    def _beside(self, link: WorkerLink) -> str:
        """Who of its instance stands still as well: in a collective all wait for the one that does
        not come, and which one that is a person has to find out."""
        still_s = max(link.watchdog.silent_s, link.watchdog.stuck_s) / 2
        others = [
            str(one.index)
            for one in self._ranks(link.instance)
            if one is not link and one.watchdog.silent_s > still_s
        ]
        return f"; of its instance worker {', '.join(others)} stands still too" if others else ""

    def _team(self, link: WorkerLink) -> list[WorkerLink]:
        """Those that compute together with it, itself among them; they open its doorbell too."""
        return self.links[link.leader : link.leader + link.shape.team_size]

    def _ranks(self, instance: int) -> list[WorkerLink]:
        return [link for link in self.links if link.instance == instance]


async def first_death(links: Iterable[WorkerLink]) -> NodeServeError:
    """Why the first of these ended."""
    deaths = [link.death for link in links]
    await asyncio.wait(deaths, return_when=FIRST_COMPLETED)
    return next(death.result() for death in deaths if death.done())
