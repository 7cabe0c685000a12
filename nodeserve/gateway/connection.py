"""uvicorn's connection, which lets the events of a stream go to its transport as they are.

An event is written for each token. Through ASGI's messages it would pass middleware that looks at
the head of a response only, and wait in a task of its own: twice the work of writing it.
"""

import asyncio
from collections.abc import MutableMapping
from typing import Any, cast

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

OUTLET = "nodeserve.outlet"  # in a scope: the connection's


class Outlet:
    """Where the parts of a chunked response go, once its head was sent as ASGI has it."""

    def __init__(self, transport: asyncio.Transport, flow: FlowControl) -> None:
        self._transport = transport
        self._flow = flow

    def is_ready(self) -> bool:
        """Whether the client reads as fast as is written, or almost."""
        return not self._flow.write_paused

    def put(self, data: bytes) -> None:
        """Write a part now. An empty one would end the response, and is none."""
        if data and not self._transport.is_closing():
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    async def write(self, data: bytes) -> None:
        """As `put`, when the client has read."""
        await self._flow.drain()
        self.put(data)


class HttpConnection(HttpToolsProtocol):
    """Its scopes have an Outlet."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._outlet = Outlet(transport, self.flow)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        cast(MutableMapping[str, Any], self.scope)[OUTLET] = self._outlet
