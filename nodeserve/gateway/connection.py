"""uvicorn's connection, with bounds on what strangers send, and a short way for events of streams.

An event is written for each token. Through ASGI's messages it would pass middleware that looks at
the head of a response only, and wait in a task of its own: twice the work of writing it.

A request's head has a size and a time, which uvicorn leaves open: anybody could fill the memory
with headers, or hold connections with requests that never come, before a key is asked for.
"""

import asyncio
import json
from collections.abc import MutableMapping
from http import HTTPStatus
from typing import Any, cast

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nodeserve.gateway.problems import HttpProblem, error_object

OUTLET = "nodeserve.outlet"  # in a scope: the connection's
MAX_HEAD_BYTES = 64 << 10  # of a request: its line and its headers
HEAD_TIMEOUT_S = 30.0  # for these to arrive
NO_HTTP = HttpProblem(400, "invalid_http", "this is no HTTP/1.1 request")
TOO_LARGE = HttpProblem(
    431, "head_too_large", f"the request's headers have more than {MAX_HEAD_BYTES} bytes"
)


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
        self._in_head = False  # a request has begun, and its head is not whole
        self._num_requests = 0  # that came whole
        self._num_head_bytes = 0  # that were read of one that has not come whole
        self._problem = NO_HTTP  # what is wrong with what cannot be read
        self._head_timer: asyncio.TimerHandle | None = None
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_head(False)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        num_before = self._num_requests
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head and self._num_requests == num_before:
            # What came with the end of another request, no more than one read, is not counted.
            self._num_head_bytes += len(data)
        if self._num_head_bytes > MAX_HEAD_BYTES:
            self._problem = TOO_LARGE
            self.send_400_response("")
        elif self._head_timer is None and (self._in_head or not self._is_answering()):
            self._expect_head()

    def _expect_head(self, on: bool = True) -> None:
        """Within HEAD_TIMEOUT_S from now; or no more."""
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        if on:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def _head_is_late(self) -> None:
        if self._is_answering():
            self._expect_head()  # of one behind it: the answer counts more
        else:
            self.transport.close()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def send_400_response(self, msg: str) -> None:
        """uvicorn's name for the answer to what is no request. In the midst of another answer it
        would be a part of that."""
        if not self._is_answering():
            status = HTTPStatus(self._problem.status)
            body = json.dumps(error_object(self._problem)).encode()
            head = (
                f"HTTP/1.1 {status} {status.phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()

    # ---- what the parser calls

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        cast(MutableMapping[str, Any], self.scope)[OUTLET] = self._outlet

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            self._problem = TOO_LARGE
            raise ValueError("the head is too large")  # the parser stops; uvicorn answers
        self._in_head = False
        self._num_head_bytes = 0
        if self._head_timer is not None:
            self._expect_head(False)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._num_requests += 1
