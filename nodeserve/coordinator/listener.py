"""The Unix socket: binding it safely, and the incoming half of each connection.

A socket file whose server is gone is replaced, a live one is refused. The look and the bind happen
under a lock on the directory, so two servers that start at once cannot both find it stale.
"""

import asyncio
import contextlib
import fcntl
import os
import socket
import stat
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from nodeserve.coordinator.access import PRIVATE, Access, peer_of
from nodeserve.coordinator.coordinator import Coordinator
from nodeserve.coordinator.intake import Intake
from nodeserve.coordinator.streams import Backlog, Stream
from nodeserve.errors import ConfigError, NodeServeError, Overloaded, ProtocolError
from nodeserve.log import about, logger
from nodeserve.policy.metering import Meter, Quota
from nodeserve.wire.frames import FrameReader
from nodeserve.wire.messages import (
    TO_SERVER,
    Abort,
    GetAudit,
    GetExperts,
    GetHealth,
    GetStats,
    Health,
    Hello,
    Stats,
    Stop,
    Submit,
    ToServer,
    Trace,
)

BACKLOG_CONNECTIONS = 1024
WRITE_HIGH_WATER_BYTES = 1 << 18
# How long a frame may be incomplete: so many looks. A loop that stood still has not looked.
FRAME_LOOKS = 3
LOOK_S = 10.0
LOCK_PATIENCE_S, LOCK_PAUSE_S = 5.0, 0.01  # another server holds it while it looks and binds


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What the server holds every connection to."""

    max_frame_bytes: int
    max_backlog_bytes: int
    max_connections: int
    quota: Quota
    access: Access
    backlog: Backlog
    incoming: Backlog  # for frames that are not complete, and messages that wait for their turn


@contextlib.contextmanager
def bound_socket(path: Path, access: Access) -> Iterator[socket.socket]:
    """A listening socket at `path`; the file goes when the block ends, if still ours."""
    with _locked(path.parent):
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        old_mask = os.umask(0o777 & ~PRIVATE)
        try:
            listener.bind(str(path))
        except OSError as problem:
            listener.close()
            raise ConfigError(f"cannot bind {path}: {problem.strerror}; use --socket") from None
        finally:
            os.umask(old_mask)
        try:
            access.apply(path)  # before anybody can connect
        except BaseException:
            listener.close()
            path.unlink()
            raise
        listener.listen(BACKLOG_CONNECTIONS)
        # While this is open no other file gets its number: on our way down, when nobody listens
        # any more, a next server may replace it.
        ours = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield listener
    finally:
        listener.close()
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.lstat(), os.fstat(ours)):
                path.unlink()
        os.close(ours)


def remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on. ConfigError: somebody does, or is starting."""
    with _locked(path.parent):
        _remove_stale(path)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as problem:
        raise ConfigError(f"no folder {folder} for the socket: {problem.strerror}") from None
    try:
        give_up_s = time.monotonic() + LOCK_PATIENCE_S
        while not _took(descriptor):
            if time.monotonic() >= give_up_s:
                raise ConfigError(f"another server is starting in {folder}: try again")
            time.sleep(LOCK_PAUSE_S)
        yield
    finally:
        os.close(descriptor)


def _took(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} exists and is no socket: remove it or use --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # alive, with a full backlog
        except OSError as problem:
            raise ConfigError(f"cannot use {path}: {problem.strerror}; use --socket") from None
    raise ConfigError(
        f"a server is already running on {path}: stop it with `nodeserve stop`, or use --socket"
    )


class Answers(Protocol):
    """Who knows what is not about a request: desk.py."""

    def welcome(self) -> Hello: ...
    def stats(self) -> Stats: ...
    def health(self) -> Health: ...
    def audit(self, stream: Stream) -> None:
        """The Audit follows."""

    def experts(self, stream: Stream) -> None:
        """The Experts follow."""

    def stop(self, drain: bool) -> None: ...


class Connection(asyncio.Protocol):
    """One client. Anything that is not a message ends the connection with a Goodbye.

    Nothing more is read while messages of an earlier read wait for their turn.
    """

    _transport: asyncio.Transport  # from connection_made on

    def __init__(
        self,
        coordinator: Coordinator,
        desk: Answers,
        limits: ConnectionLimits,
        intake: Intake,
    ) -> None:
        self._coordinator = coordinator
        self._desk = desk
        self._limits = limits
        self._intake = intake
        self._reader = FrameReader(limits.max_frame_bytes)
        self._payloads: deque[bytes] = deque()  # not taken yet
        self._waiting_bytes = 0  # of those
        self._reading = True
        self._incoming_bytes = 0  # as counted in `limits.incoming`
        self._look: asyncio.TimerHandle | None = None  # at a frame that is not complete
        self._num_looks = 0  # since the last complete one
        self._stream: Stream | None = None

    @property
    def stream(self) -> Stream:
        assert self._stream is not None
        return self._stream

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's own class is none of asyncio's
        self._transport = transport
        transport.set_write_buffer_limits(high=WRITE_HIGH_WATER_BYTES)
        limits, coordinator = self._limits, self._coordinator
        meter = Meter(limits.quota)
        self._stream = Stream(transport, limits.max_backlog_bytes, meter, limits.backlog)
        try:
            self._check(transport)
        except NodeServeError as error:
            coordinator.tally.turned_away(error)
            self._stream.goodbye(error.code, str(error))
            return
        coordinator.streams.add(self._stream)
        self._stream.send(self._desk.welcome())

    def _check(self, transport: asyncio.Transport) -> None:
        peer = peer_of(transport.get_extra_info("socket"))
        self._limits.access.check(peer)
        if self._coordinator.farewell is not None:  # it came while the listener was being closed
            raise self._coordinator.farewell
        if len(self._coordinator.streams) >= self._limits.max_connections:
            raise Overloaded(
                f"{self._limits.max_connections} clients are connected already (--max-connections)"
            )
        logger.debug("connection from %s", peer, extra=about("connected", peer=peer.pid))

    def data_received(self, data: bytes) -> None:
        if self.stream.closed:
            return
        waits = bool(self._payloads)
        try:
            payloads = self._reader.feed(data)
            self._payloads.extend(payloads)
            self._waiting_bytes += sum(map(len, payloads))
            self._count_incoming()
            if self._incoming_bytes > self._limits.incoming.left_bytes:
                raise Overloaded("too much has come of messages that wait or are not complete")
        except NodeServeError as error:
            self._drop(error)
        else:
            if payloads:
                self._num_looks = 0
            if self._reader.incomplete and self._look is None:
                self._look_later()
        if self._payloads and not waits:
            self._intake.offer(self)

    def _count_incoming(self) -> None:
        """What it holds has changed."""
        num_bytes = self._reader.num_held_bytes + self._waiting_bytes
        self._limits.incoming.left_bytes -= num_bytes - self._incoming_bytes
        self._incoming_bytes = num_bytes

    def _look_later(self) -> None:
        self._look = asyncio.get_running_loop().call_later(LOOK_S, self._look_at_frame)

    def _look_at_frame(self) -> None:
        self._look = None
        if self.stream.closed or not self._reader.incomplete:
            return
        self._num_looks += self._reading  # or it is we who keep it waiting
        if self._num_looks < FRAME_LOOKS:
            self._look_later()
        else:
            words = f"a message has begun and did not end in {FRAME_LOOKS * LOOK_S:g} s"
            self._drop(ProtocolError(words))

    def _drop(self, error: NodeServeError) -> None:
        """The connection ends for what came; nothing is kept of that, also if it closes later."""
        self._coordinator.drop_stream(self.stream, error)
        self._let_go()

    def _let_go(self) -> None:
        self._reader = FrameReader(self._limits.max_frame_bytes)
        self._payloads.clear()
        self._waiting_bytes = 0
        self._count_incoming()
        if self._look is not None:
            self._look.cancel()
            self._look = None

    def take(self, most: int) -> int:
        """Handle up to so many messages."""
        num_taken = 0
        while num_taken < most and self._payloads and not self.stream.closed:
            num_taken += 1
            payload = self._payloads.popleft()
            self._waiting_bytes -= len(payload)
            try:
                self._on_message(TO_SERVER.decode(payload))
            except NodeServeError as error:
                self._drop(error)
        self._count_incoming()
        return num_taken

    def drained(self) -> bool:
        """No message waits: then the socket is read, and else not."""
        if self.stream.closed:
            self._let_go()
        if self._payloads and self._reading:
            self._transport.pause_reading()
        elif not self._payloads and not self._reading and not self.stream.closed:
            self._transport.resume_reading()
        self._reading = not self._payloads
        return self._reading

    def _on_message(self, message: ToServer) -> None:
        match message:
            case Submit():
                self._coordinator.submit(self.stream, message)
            case Abort():
                if request := self.stream.requests.get(message.request_id):
                    self._coordinator.abort(request)
            case GetStats():
                self.stream.send(self._desk.stats())
            case GetHealth():
                self.stream.send(self._desk.health())
            case GetAudit():
                self._desk.audit(self.stream)
            case GetExperts():
                self._desk.experts(self.stream)
            case Stop():
                self._desk.stop(message.drain)
            case Trace():
                self._coordinator.tracer.turn(self.stream, message.on)

    def connection_lost(self, exc: Exception | None) -> None:
        self._coordinator.leave(self.stream)
        self.stream.lost()
        self._let_go()

    def pause_writing(self) -> None:
        self.stream.pause()

    def resume_writing(self) -> None:
        self.stream.resume()
        self._coordinator.tracer.flush()
