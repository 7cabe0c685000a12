"""The memory and the doorbells between the coordinator and one worker, or between two workers.

The coordinator makes everything, and what it made it destroys; a worker opens and closes. `inbox`
and `outbox` are the worker's on both sides: the coordinator posts to the inbox.

Nothing stays in /dev/shm. A segment's name is gone before the worker starts: its descriptor is
inherited. The semaphore has no descriptor, so its name lives until the worker has opened it; the
worker's first record says so, and then the coordinator calls `unlink_names`. A coordinator killed
in between leaves a name that contains its pid; `sweep_stale` removes those of dead pids.
"""

import contextlib
import mmap
import os
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, final

import posix_ipc

from nodeserve._host import RING_HEADER_BYTES, Ring
from nodeserve.errors import RingError
from nodeserve.wire.ring import (
    BlockingReceiver,
    BlockingSender,
    EventfdDoorbell,
    QueueingSender,
    Receiver,
    RungReceiver,
    SemaphoreDoorbell,
)

SHM = Path("/dev/shm")
RING_BYTES = 2 << 20  # per direction; eight workers stay within the 64 MB that containers get
TEAM_RING_BYTES = 1 << 20  # likewise, between a leader and each of its followers
MAX_QUEUED = 1 << 16
_OURS = re.compile(r"(?:sem\.)?nodeserve-(\d+)-[0-9a-f]+-[\w.-]+")


@dataclass(frozen=True, slots=True)
class ChannelSpec:
    """What a worker needs to open its end: three inherited descriptors and one name."""

    inbox_fd: int
    outbox_fd: int
    eventfd: int
    semaphore: str


def _name(node_id: str, label: str) -> str:
    name = f"nodeserve-{os.getpid()}-{node_id}-{label}"
    assert _OURS.fullmatch(name), f"sweep_stale would not know {name}"
    return f"/{name}"


def _make_segment(name: str, num_bytes: int) -> int:
    """A descriptor of fresh shared memory that no name leads to any more."""
    try:
        segment = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=num_bytes, mode=0o600)
        segment.unlink()
    except (OSError, posix_ipc.Error) as error:
        raise RingError(f"cannot make shared memory for a ring: {error}") from error
    try:
        # Reserve the pages: a full /dev/shm is an error here, not a SIGBUS at some later record.
        os.posix_fallocate(segment.fd, 0, num_bytes)
    except OSError as error:
        segment.close_fd()
        raise RingError(f"no {num_bytes} bytes of {SHM} for a ring: {error}") from error
    return int(segment.fd)


class _End:
    """Holds what an end must give back; closing twice is harmless."""

    def __init__(self) -> None:
        self._resources = ExitStack()

    def _own_fd(self, fd: int) -> int:
        self._resources.callback(os.close, fd)
        return fd

    def _map_ring(self, fd: int, create: bool) -> Ring:
        memory = mmap.mmap(fd, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._resources.callback(memory.close)
        ring = Ring(memory, create)
        self._resources.callback(ring.close)
        return ring

    def close(self) -> None:
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@final
class CoordinatorEnd(_End):
    """Start the worker with `spec` and `inherited_fds`. Then `inbox.post`; whenever `fileno()` is
    readable, `receive`.

    `node_id` is random and hexadecimal, the same for all channels of a node; `label` tells them
    apart. `ring_bytes` is the room for records in each direction.
    """

    def __init__(self, node_id: str, label: str, ring_bytes: int = RING_BYTES) -> None:
        super().__init__()
        self.capacity_bytes = ring_bytes
        try:
            self._make(_name(node_id, label), RING_HEADER_BYTES + ring_bytes)
        except BaseException:
            self.close()
            raise

    def _make(self, name: str, num_bytes: int) -> None:
        inbox_fd = self._own_fd(_make_segment(f"{name}-inbox", num_bytes))
        outbox_fd = self._own_fd(_make_segment(f"{name}-outbox", num_bytes))
        eventfd = self._own_fd(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        self._semaphore = posix_ipc.Semaphore(f"{name}-bell", posix_ipc.O_CREX, mode=0o600)
        self._resources.callback(self._semaphore.close)
        self._names = [self._semaphore.name]
        self._resources.callback(self.unlink_names)
        self.spec = ChannelSpec(inbox_fd, outbox_fd, eventfd, self._semaphore.name)
        self.inherited_fds = (inbox_fd, outbox_fd, eventfd)
        self._doorbell = EventfdDoorbell(eventfd)
        self._worker = worker = SemaphoreDoorbell(self._semaphore)
        self.inbox = QueueingSender(self._map_ring(inbox_fd, create=True), worker, MAX_QUEUED)
        self.outbox = RungReceiver(
            self._map_ring(outbox_fd, create=True), worker, own=self._doorbell
        )

    def fileno(self) -> int:
        return self._doorbell.fileno()

    def receive(self) -> list[bytes]:
        """What the worker sent; also sends on what waited for room. Never blocks.

        When the worker has died, call it until nothing comes: it may have put records and not rung
        for them, and more than one call takes.
        """
        records = self.outbox.receive()
        self.inbox.flush()
        return records

    def nudge(self) -> None:
        """End the worker's wait, if it waits. A semaphore's timeout is a time of day: whoever sets
        the clock back by an hour makes a wait that is under way an hour longer."""
        self._worker.ring()

    def unlink_names(self) -> None:
        """Call once the worker has spoken: it has opened everything."""
        while self._names:
            with contextlib.suppress(posix_ipc.ExistentialError):
                posix_ipc.unlink_semaphore(self._names.pop())


@final
class WorkerEnd(_End):
    """`inbox.drain` and `inbox.wait`; `outbox.put`. Send a first record at once: it says that the
    names may go."""

    def __init__(self, spec: ChannelSpec) -> None:
        super().__init__()
        try:
            self._open(spec)
        except BaseException:
            self.close()
            raise

    def _open(self, spec: ChannelSpec) -> None:
        for fd in (spec.inbox_fd, spec.outbox_fd, spec.eventfd):
            os.set_inheritable(self._own_fd(fd), False)
        try:
            semaphore = posix_ipc.Semaphore(spec.semaphore)
        except posix_ipc.Error as error:
            raise RingError(f"cannot open the doorbell {spec.semaphore}: {error}") from error
        self._resources.callback(semaphore.close)
        self.bell = own = SemaphoreDoorbell(semaphore)
        coordinator = EventfdDoorbell(spec.eventfd)
        inbox = self._map_ring(spec.inbox_fd, create=False)
        outbox = self._map_ring(spec.outbox_fd, create=False)
        self.inbox = BlockingReceiver(inbox, coordinator, own)
        self.outbox = BlockingSender(outbox, coordinator, own)


@dataclass(frozen=True, slots=True)
class TeamSpec:
    """What a leader and one of its followers open their rings with: two inherited descriptors, and
    the names of the doorbells that they have from the coordinator."""

    plans_fd: int  # from the leader
    answers_fd: int  # to it
    leader: str
    follower: str


@final
class TeamRings(_End):
    """The coordinator's part: it makes the rings between a leader and a follower, and hands them
    out by `spec` and `inherited_fds`. It takes no part in what they say."""

    def __init__(
        self,
        node_id: str,
        label: str,
        leader: ChannelSpec,
        follower: ChannelSpec,
        ring_bytes: int = TEAM_RING_BYTES,
    ) -> None:
        super().__init__()
        name, num_bytes = _name(node_id, label), RING_HEADER_BYTES + ring_bytes
        try:
            fds = [self._own_fd(_make_segment(f"{name}-{way}", num_bytes)) for way in ("p", "a")]
            for fd in fds:
                self._map_ring(fd, create=True)
        except BaseException:
            self.close()
            raise
        plans_fd, answers_fd = fds
        self.spec = TeamSpec(plans_fd, answers_fd, leader.semaphore, follower.semaphore)
        self.inherited_fds = tuple(fds)


@final
class TeamEnd(_End):
    """A worker's end of the rings to its leader, or to one of its followers if it `leads`: records
    there end the waits of `worker`'s inbox as well. To be made before the worker's first record,
    like its own end: both doorbells' names may go then."""

    def __init__(self, spec: TeamSpec, leads: bool, worker: WorkerEnd) -> None:
        super().__init__()
        try:
            self._open(spec, leads, worker)
        except BaseException:
            self.close()
            raise

    def _open(self, spec: TeamSpec, leads: bool, worker: WorkerEnd) -> None:
        fds = spec.plans_fd, spec.answers_fd
        for fd in fds:
            os.set_inheritable(self._own_fd(fd), False)
        name = spec.follower if leads else spec.leader
        try:
            semaphore = posix_ipc.Semaphore(name)
        except posix_ipc.Error as error:
            raise RingError(f"cannot open the doorbell {name}: {error}") from error
        self._resources.callback(semaphore.close)
        peer = SemaphoreDoorbell(semaphore)
        to_fd, from_fd = fds if leads else reversed(fds)
        self.outbox = BlockingSender(self._map_ring(to_fd, create=False), peer, worker.bell)
        self.inbox = Receiver(self._map_ring(from_fd, create=False), peer)
        worker.inbox.also(self.inbox)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def sweep_stale(directory: Path = SHM) -> list[str]:
    """Remove what coordinators that were killed while starting left behind; returns the names."""
    removed = []
    for path in directory.iterdir():
        match = _OURS.fullmatch(path.name)
        if match is None or _is_alive(int(match[1])):
            continue
        with contextlib.suppress(FileNotFoundError, PermissionError):
            path.unlink()
            removed.append(path.name)
    return sorted(removed)
