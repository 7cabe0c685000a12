"""A relay between a gateway and its server that notes when each token passed.

What passes here is what a client of the bare socket would have at that moment, so a token's time at
an HTTP client less its time here is what the gateway adds.
"""

import asyncio
import time
from pathlib import Path
from typing import cast

from nodeserve.wire.frames import FrameReader
from nodeserve.wire.messages import TO_CLIENT, TO_SERVER, Submit, Tokens, unpack_ids

MAX_FRAME_BYTES = 64 << 20


class Tap:
    """`times[number]` has one entry for each token of the answer to the prompt that begins with the
    token id `number`."""

    def __init__(self, server: Path) -> None:
        self.server = server
        self.times: dict[int, list[float]] = {}

    async def listen(self, path: Path) -> asyncio.Server:
        return await asyncio.get_running_loop().create_unix_server(
            lambda: _FromGateway(self), str(path)
        )


class _FromGateway(asyncio.Protocol):
    def __init__(self, tap: Tap) -> None:
        self.tap = tap
        self.numbers: dict[int, int] = {}  # by the gateway's request id
        self._reader = FrameReader(MAX_FRAME_BYTES)
        self._early: list[bytes] = []
        self._server: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)
        loop = asyncio.get_running_loop()
        self._connecting = loop.create_task(self._connect(loop))

    async def _connect(self, loop: asyncio.AbstractEventLoop) -> None:
        transport, _ = await loop.create_unix_connection(
            lambda: _FromServer(self), str(self.tap.server)
        )
        self._server = cast(asyncio.WriteTransport, transport)
        for data in self._early:
            self._server.write(data)

    def data_received(self, data: bytes) -> None:
        for payload in self._reader.feed(data):
            message = TO_SERVER.decode(payload)
            if type(message) is Submit:
                number = unpack_ids(message.token_ids)[0]
                self.numbers[message.request_id] = number
                self.tap.times[number] = []
        if self._server is None:
            self._early.append(data)
        else:
            self._server.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._server is not None:
            self._server.close()


class _FromServer(asyncio.Protocol):
    def __init__(self, gateway: _FromGateway) -> None:
        self._gateway = gateway
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader(MAX_FRAME_BYTES)

    def data_received(self, data: bytes) -> None:
        at_s = time.perf_counter()
        self._gateway.transport.write(data)
        # The loop writes when this has returned: what is noted must not make the gateway wait.
        self._loop.call_soon(self._note, data, at_s)

    def _note(self, data: bytes, at_s: float) -> None:
        times, numbers = self._gateway.tap.times, self._gateway.numbers
        for payload in self._reader.feed(data):
            message = TO_CLIENT.decode(payload)
            if type(message) is Tokens:
                for request_id, token_ids, _ in message.items:
                    times[numbers[request_id]] += [at_s] * (len(token_ids) // 4)

    def connection_lost(self, exc: Exception | None) -> None:
        self._gateway.transport.close()
