"""What the fleet does with a worker's records, over a real channel and without a process."""

import asyncio
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from nodeserve.coordinator.fleet import Fleet
from nodeserve.coordinator.link import READY, WorkerLink
from nodeserve.layout import Shape
from nodeserve.types import Role
from nodeserve.wire.channel import CoordinatorEnd, WorkerEnd
from nodeserve.wire.messages import FROM_WORKER, Alive, FromWorker
from nodeserve.wire.ring import DRAIN_RECORDS
from tests.patience import PATIENCE_S

LOAD = [0, 0, 0, 0, 0, 0]


@contextmanager
def followed(
    handle: Callable[[WorkerLink, FromWorker], None],
) -> Iterator[tuple[Fleet, WorkerLink, WorkerEnd]]:
    """A fleet that listens to one worker, and that worker's end of the rings."""
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[None]] = []

    def begin(work: Any, name: str) -> asyncio.Task[None]:
        tasks.append(loop.create_task(work, name=name))
        return tasks[-1]

    async def watch(link: WorkerLink) -> str:
        await loop.create_future()
        return "ended"

    with CoordinatorEnd(secrets.token_hex(4), "w0", 1 << 18) as channel:
        inbox_fd, outbox_fd, eventfd = map(os.dup, channel.inherited_fds)
        spec = replace(channel.spec, inbox_fd=inbox_fd, outbox_fd=outbox_fd, eventfd=eventfd)
        with WorkerEnd(spec) as worker:
            link = WorkerLink(0, Role.MIXED, channel, -1)
            link.state = READY
            supervisor: Any = SimpleNamespace(links=[link], watch=watch)
            none = cast(Any, None)
            fleet = Fleet(none, supervisor, none, none, handle, begin, none)
            fleet._follow(link)
            try:
                yield fleet, link, worker
            finally:
                loop.remove_reader(channel.fileno())
                for task in tasks:
                    task.cancel()


async def test_a_bell_after_the_end_of_a_life_rings_once() -> None:
    """The process may write until SIGKILL has reached it, and nobody empties its bell."""
    with followed(lambda link, message: None) as (fleet, link, worker):
        link.give_up("hung")
        worker.outbox.put(FROM_WORKER.encode(Alive(LOAD)))
        await asyncio.wait_for(fleet._pumps[0], PATIENCE_S)
        assert link.num_received == 0
        assert not asyncio.get_running_loop().remove_reader(link.channel.fileno()), "still heard"


async def test_a_record_that_meets_a_bug_of_ours_ends_its_worker_alone() -> None:
    def handle(link: WorkerLink, message: FromWorker) -> None:
        raise IndexError("pop from an empty deque")

    with followed(handle) as (fleet, link, worker):
        worker.outbox.put(FROM_WORKER.encode(Alive(LOAD)))
        error = await link.death
        assert "sent what could not be carried out: IndexError('pop" in str(error)
        assert not any(task.done() and task.exception() for task in fleet._pumps.values())


async def test_all_that_a_dead_worker_left_behind_is_taken() -> None:
    """It may be more than one look at the ring takes, and the last word may be why it ended."""
    count = DRAIN_RECORDS + 10

    async def ended(link: WorkerLink) -> str:
        for _ in range(count):
            assert worker.outbox.put(FROM_WORKER.encode(Alive(LOAD)), 0.0)
        return "ended"

    with followed(lambda link, message: None) as (fleet, link, worker):
        cast(Any, fleet._supervisor).watch = ended
        await fleet._watch(link)
        assert "ended" in str(link.death.result())
        assert link.num_received == count


async def test_the_first_rank_of_each_team_leads_it() -> None:
    links = [WorkerLink(10 + rank, Role.MIXED, cast(Any, None), -1) for rank in range(8)]
    for rank, link in enumerate(links):
        link.rank, link.shape = rank, Shape(tp=2, pp=2, ep=2)
    assert [link.index for link in links if link.leads] == [10, 14]
    assert [link.leader for link in links] == [10] * 4 + [14] * 4
