"""HTTP exchanges whose bytes get the time at which they were read."""

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import NamedTuple, cast
from urllib.parse import urlsplit

from nodeserve.errors import ConfigError, ConnectionLost, NodeServeError
from nodeserve.loadgen.http import ResponseReader

IDLE_S = 1.0  # a connection unused for longer is not used again: servers close theirs after a few
OnBody = Callable[[bytes, float], None]  # bytes, and when they were read


class Address(NamedTuple):
    host: str
    port: int
    tls: bool
    path: str  # in front of every route, without a slash at its end

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_url(url: str) -> Address:
    """Where "http://host:8000" or "https://host/prefix" is; a trailing /v1 may be there or not."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url {url}: use http://HOST:PORT, such as http://127.0.0.1:8000")
    tls = parts.scheme == "https"
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return Address(parts.hostname, port or (443 if tls else 80), tls, path)


class HttpClient:
    """One server. Connections are kept for the next request when they may be."""

    def __init__(self, address: Address, connect_timeout_s: float) -> None:
        self._address = address
        self._timeout_s = connect_timeout_s
        self._idle: list[tuple[float, _Connection]] = []
        self._tls = ssl.create_default_context() if address.tls else None

    def request(self, method: str, route: str, headers: dict[str, str], body: bytes) -> bytes:
        """The bytes of a request."""
        lines = [
            f"{method} {self._address.path}{route} HTTP/1.1",
            f"Host: {self._address.authority}",
            f"Content-Length: {len(body)}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body

    async def exchange(self, request: bytes, on_body: OnBody) -> ResponseReader:
        """Send, and hand on the body until the response has ended; ConnectionLost if it breaks.

        An idle connection that the server closed meanwhile is replaced by a new one.
        """
        while (connection := self._pop_idle()) is not None:
            try:
                return await self._on(connection, request, on_body)
            except _ClosedBefore:
                continue
        try:
            return await self._on(await self._connect(), request, on_body)
        except _ClosedBefore as error:
            raise ConnectionLost(str(error)) from None

    async def close(self) -> None:
        while self._idle:
            self._idle.pop()[1].abort()

    async def _on(
        self, connection: "_Connection", request: bytes, on_body: OnBody
    ) -> ResponseReader:
        reader = ResponseReader()
        try:
            await connection.exchange(request, reader, on_body)
        except BaseException:
            connection.abort()
            raise
        if reader.reusable and connection.open:
            self._idle.append((time.perf_counter(), connection))
        else:
            connection.abort()
        return reader

    def _pop_idle(self) -> "_Connection | None":
        while self._idle:
            since_s, connection = self._idle.pop()
            if connection.open and time.perf_counter() - since_s < IDLE_S:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        address = self._address
        try:
            async with asyncio.timeout(self._timeout_s):
                _, connection = await loop.create_connection(
                    _Connection, address.host, address.port, ssl=self._tls
                )
        except TimeoutError:
            raise ConnectionLost(
                f"{address.authority} did not answer in {self._timeout_s:g} s"
            ) from None
        except OSError as problem:
            raise ConnectionLost(
                f"no server at {address.authority}: {problem.strerror or problem}"
            ) from None
        return connection


class _ClosedBefore(Exception):
    """The connection ended before the first byte of a response."""


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.open = False
        self._transport: asyncio.Transport | None = None
        self._reader: ResponseReader | None = None
        self._on_body: OnBody | None = None
        self._ended: asyncio.Future[None] | None = None
        self._any = False

    async def exchange(self, request: bytes, reader: ResponseReader, on_body: OnBody) -> None:
        assert self._transport is not None
        self._reader, self._on_body, self._any = reader, on_body, False
        self._ended = asyncio.get_running_loop().create_future()
        if not self.open:
            raise _ClosedBefore("the connection was closed before the request was sent")
        self._transport.write(request)
        try:
            await self._ended
        finally:
            self._reader = self._on_body = self._ended = None

    def abort(self) -> None:
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its type
        self.open = True

    def data_received(self, data: bytes) -> None:
        at_s = time.perf_counter()
        if self._reader is None or self._on_body is None:
            self.abort()  # it speaks without being asked
            return
        self._any = True
        try:
            body = self._reader.feed(data)
            if body:
                self._on_body(body, at_s)
        except NodeServeError as error:
            self._end(error)
            return
        if self._reader.ended:
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self._reader is None:
            return
        if not self._any:
            why = f": {exc}" if exc else ""
            self._end(_ClosedBefore(f"the server closed the connection without an answer{why}"))
            return
        try:
            self._reader.eof()
        except NodeServeError as error:
            self._end(ConnectionLost(str(error)))
        else:
            self._end(None)

    def _end(self, error: Exception | None) -> None:
        if self._ended is None or self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)
