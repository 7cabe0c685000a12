"""The real incoming half of a connection over a transport in memory: bytes, and no reader."""

import asyncio
import socket
from collections.abc import Callable

from nodeserve.coordinator.access import Access
from nodeserve.coordinator.intake import Intake
from nodeserve.coordinator.listener import Connection, ConnectionLimits
from nodeserve.coordinator.stats import node_stats
from nodeserve.coordinator.streams import Backlog, Stream
from nodeserve.policy.metering import Quota
from nodeserve.wire.frames import frame
from nodeserve.wire.messages import (
    PROTOCOL_VERSION,
    TO_SERVER,
    Audit,
    Experts,
    Goodbye,
    Health,
    Hello,
    Stats,
    ToClient,
    ToServer,
)
from tests.fakes.node import FakeNode
from tests.fakes.transport import FakeTransport

MAX_FRAME_BYTES = 1 << 16
LIMITS = ConnectionLimits(
    MAX_FRAME_BYTES, 1 << 20, 4, Quota(), Access(), Backlog(1 << 24), Backlog(1 << 24)
)


class ConnectedTransport(FakeTransport):
    """Also remembers what is not about a request. `peer` is a socket that the kernel can name."""

    def __init__(self, peer: socket.socket) -> None:
        super().__init__()
        self.peer = peer
        self.hellos: list[Hello] = []
        self.stats: list[Stats] = []
        self.goodbyes: list[Goodbye] = []
        self.reads = True

    def take(self, message: ToClient) -> None:
        super().take(message)
        match message:
            case Hello():
                self.hellos.append(message)
            case Stats():
                self.stats.append(message)
            case Goodbye():
                self.goodbyes.append(message)

    def get_extra_info(self, name: str) -> socket.socket:
        assert name == "socket"
        return self.peer

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True


class FakeDesk:
    """Answers with what a fake node can tell."""

    def __init__(self, node: FakeNode, on_stop: Callable[[bool], None]) -> None:
        self._node = node
        self._on_stop = on_stop

    def welcome(self) -> Hello:
        return Hello(PROTOCOL_VERSION, {})

    def stats(self) -> Stats:
        return Stats(node_stats(self._node.coordinator, self._node.now))

    def health(self) -> Health:
        return Health({"state": "ready"})

    def audit(self, stream: Stream) -> None:
        stream.send(Audit({"problems": []}))

    def experts(self, stream: Stream) -> None:
        stream.send(Experts({"model": {}, "ranks": [], "silent": []}))

    def stop(self, drain: bool) -> None:
        self._on_stop(drain)


class ConnectedClient:
    """One client of a fake node: what it sends reaches the real decoder and coordinator.

    A socket pair stands where the connection's socket is, for the kernel to say who is there.
    """

    def __init__(
        self,
        node: FakeNode,
        limits: ConnectionLimits = LIMITS,
        stop: Callable[[bool], None] = lambda drain: None,
    ) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX)
        self.transport = ConnectedTransport(self.theirs)
        intake = Intake(asyncio.get_running_loop().call_soon)
        self.connection = Connection(node.coordinator, FakeDesk(node, stop), limits, intake)
        self.connection.connection_made(self.transport)  # type: ignore[arg-type]

    def feed(self, data: bytes) -> None:
        """Bytes arrive, unless the connection does not read now."""
        assert self.transport.reads
        self.connection.data_received(data)

    def send(self, *messages: ToServer) -> None:
        self.feed(b"".join(frame(TO_SERVER.encode(message)) for message in messages))

    def leave(self) -> None:
        """The peer is gone."""
        self.transport.closed = True
        self.connection.connection_lost(None)
        self.ours.close()
        self.theirs.close()
