"""The wire protocol by hand: what the client library would hide from a test."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from nodeserve.errors import ProtocolError
from nodeserve.wire.frames import HEADER, frame
from nodeserve.wire.messages import (
    TO_CLIENT,
    TO_SERVER,
    Audit,
    End,
    GetAudit,
    GetStats,
    Goodbye,
    Hello,
    Stats,
    Submit,
    ToClient,
    Tokens,
    ToServer,
    Trace,
    Traced,
    pack_ids,
    unpack_ids,
)
from nodeserve.wire.tracing import EVENTS, Worker

PAUSE_S = 0.02  # between two questions


class RawClient:
    """One connection; collects tokens and Ends by request id."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[Any]] = {}  # of requests that asked for them
        self.ends: dict[int, list[End]] = {}
        self.goodbye: Goodbye | None = None
        self._ask_again_s = 0.0

    @classmethod
    async def connect(cls, path: Path, limit_bytes: int = 1 << 16) -> "RawClient":
        """`limit_bytes` are read ahead at most; the rest waits in the kernel and at the server."""
        client = cls(*await asyncio.open_unix_connection(str(path), limit=limit_bytes))
        assert isinstance(await client.read(), Hello)
        return client

    def send(self, *messages: ToServer) -> None:
        """At once: the server reads them together, however busy the machine is."""
        self.writer.write(b"".join(frame(TO_SERVER.encode(one)) for one in messages))

    def submit(self, request_id: int, prompt: list[int], **sampling: Any) -> None:
        sampling = {"temperature": 0.0, "ignore_eos": True, **sampling}
        self.send(Submit(request_id, pack_ids(prompt), sampling, None, 0))

    async def read(self) -> ToClient | None:
        """The next message; None at the end of the stream."""
        try:
            (size,) = HEADER.unpack(await self.reader.readexactly(HEADER.size))
            message = TO_CLIENT.decode(await self.reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        self._take(message)
        return message

    def _take(self, message: ToClient) -> None:
        match message:
            case Tokens(items):
                for request_id, token_ids, logprobs in items:
                    self.tokens.setdefault(request_id, []).extend(unpack_ids(token_ids))
                    if logprobs is not None:
                        self.logprobs.setdefault(request_id, []).extend(logprobs)
            case End():
                self.ends.setdefault(message.request_id, []).append(message)
            case Goodbye():
                self.goodbye = message

    async def read_until(self, done: Callable[[], bool]) -> None:
        while not done():
            if await self.read() is None:
                raise ProtocolError("the stream ended early")

    async def finish(self, *request_ids: int) -> None:
        """Read until all of these have ended."""
        await self.read_until(lambda: all(i in self.ends for i in request_ids))

    async def read_to_end(self) -> None:
        while await self.read() is not None:
            pass

    async def stats(self) -> dict[str, Any]:
        return await self._ask(GetStats(), Stats)

    async def audit(self) -> dict[str, Any]:
        return await self._ask(GetAudit(), Audit)

    async def _ask(self, question: ToServer, kind: type) -> dict[str, Any]:
        """Who asks in a loop for what is to come leaves the cores to those who make it come."""
        clock = asyncio.get_running_loop().time
        await asyncio.sleep(max(0.0, self._ask_again_s - clock()))
        self._ask_again_s = clock() + PAUSE_S
        self.send(question)
        while (message := await self.read()) is not None:
            if isinstance(message, kind):
                answer: dict[str, Any] = message[0]  # type: ignore[assignment]
                return answer
        raise ProtocolError("the stream ended early")

    @contextlib.asynccontextmanager
    async def tracing(self) -> AsyncIterator[None]:
        """Told of what happens, for `worker_news`."""
        self.send(Trace(True))
        try:
            yield
        finally:
            self.send(Trace(False))
            await self._until_traced(lambda message: message.over)

    async def worker_news(self) -> None:
        """Returns when a worker was lost or is back, while `tracing`. Who asks for stats instead
        until it is so keeps a core busy, and the coordinator's, that the worker needs to start."""
        await self._until_traced(
            lambda message: any(isinstance(EVENTS.made_of(one), Worker) for one in message.events)
        )

    async def _until_traced(self, is_it: Callable[[Traced], bool]) -> None:
        while (message := await self.read()) is not None:
            if isinstance(message, Traced) and is_it(message):
                return
        raise ProtocolError("the stream ended early")

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()
