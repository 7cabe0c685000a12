"""One connection to the server: frames in, frames out, and a mailbox for each request.

Always true: every mailbox gets its request's arrivals in order and then exactly one end, an `End`
or the error that ended the connection. Arrivals carry the time at which their bytes were read, so
that a slow consumer does not distort what is measured. The library reads all the time, whether or
not its callers take what came: the server never sees it as a slow reader.
"""

import asyncio
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple, cast

from nodeserve.client.mailbox import Mailbox
from nodeserve.errors import (
    ConnectionLost,
    FrameTooLarge,
    InvalidRequest,
    NodeServeError,
    ProtocolError,
    from_code,
)
from nodeserve.wire.frames import FrameReader, frame
from nodeserve.wire.messages import (
    PROTOCOL_VERSION,
    TO_CLIENT,
    TO_SERVER,
    Abort,
    Audit,
    End,
    Experts,
    GetAudit,
    GetExperts,
    GetHealth,
    GetStats,
    Goodbye,
    Health,
    Hello,
    Stats,
    Stop,
    Submit,
    ToClient,
    Tokens,
    ToServer,
    Trace,
    Traced,
)

MAX_INCOMING_BYTES = 64 << 20
WOKEN_AT_ONCE = 16
WELCOME: dict[str, type] = {  # what every call may rely on in the server's Hello
    "model": str,
    "tokenizer": str,
    "max_model_len": int,
    "vocab_size": int,
    "max_frame_bytes": int,
    "pid": int,
}


class Arrival(NamedTuple):
    """One request's share of a Tokens frame, and when it was read."""

    token_ids: bytes
    logprobs: list[Any] | None
    at_s: float


Event = Arrival | End | NodeServeError
TraceEvent = Traced | NodeServeError
Answer = asyncio.Future[dict[str, Any]]


class Connection(asyncio.Protocol):
    """Speaks the protocol of docs/protocol.md. Made by `connect`."""

    def __init__(self) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self.server: dict[str, Any] = {}
        self.welcomed: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self.error: NodeServeError | None = None
        self._reader = FrameReader(MAX_INCOMING_BYTES)
        self._mailboxes: dict[int, Mailbox[Event]] = {}
        self._sleeping: deque[Mailbox[Event]] = deque()  # something came for them
        self._is_waking = False
        self._trace: Mailbox[TraceEvent] = Mailbox()
        self._answers: dict[type, deque[Answer]] = {
            kind: deque() for kind in (Stats, Health, Audit, Experts)
        }
        self._writable = asyncio.Event()
        self._writable.set()
        self._next_id = 0
        self._transport: asyncio.Transport | None = None

    # ---- what callers ask for

    @property
    def usable(self) -> bool:
        return self.error is None

    async def submit(
        self, token_ids: bytes, sampling: dict[str, Any], slo: dict[str, Any] | None, priority: int
    ) -> tuple[int, Mailbox[Event]]:
        """Send a request; its id and where its answer arrives."""
        await self._writable.wait()
        request_id, self._next_id = self._next_id, self._next_id + 1
        data = encoded(Submit(request_id, token_ids, sampling, slo, priority))
        limit = self.server["max_frame_bytes"]
        if len(data) > limit:
            raise FrameTooLarge(
                f"the request takes {len(data)} bytes, the server allows {limit}: send less"
            )
        if self.error is not None:
            raise self.error
        mailbox: Mailbox[Event] = Mailbox()
        self._mailboxes[request_id] = mailbox
        self._write(data)
        return request_id, mailbox

    def abort(self, request_id: int) -> None:
        """Cancel a request; its End still arrives. Does nothing when it has ended."""
        if request_id in self._mailboxes:
            self._send(Abort(request_id))

    def forget(self, request_id: int) -> None:
        """Cancel a request that nobody waits for any more."""
        self.abort(request_id)
        self._mailboxes.pop(request_id, None)

    async def stats(self) -> dict[str, Any]:
        return await self._ask(GetStats(), Stats)

    async def health(self) -> dict[str, Any]:
        return await self._ask(GetHealth(), Health)

    async def audit(self) -> dict[str, Any]:
        return await self._ask(GetAudit(), Audit)

    async def experts(self) -> dict[str, Any]:
        return await self._ask(GetExperts(), Experts)

    async def _ask(self, question: ToServer, kind: type) -> dict[str, Any]:
        """Answers of a kind come in the order of the questions."""
        answer: Answer = asyncio.get_running_loop().create_future()
        if self.error is not None:
            raise self.error
        self._answers[kind].append(answer)
        self._send(question)
        return await answer

    def trace(self, on: bool) -> Mailbox[TraceEvent]:
        """Begin or end to be told what happens on the server. What comes is in the mailbox: Traced,
        the last one of a trace with `over`; or the error that ended the connection."""
        self._send(Trace(on))
        return self._trace

    def stop_server(self, drain: bool) -> None:
        self._send(Stop(drain))

    async def close(self) -> None:
        """End the connection; the server cancels what still runs on it."""
        self._fail(ConnectionLost("the client was closed"))
        await asyncio.wait([self.closed])

    def _send(self, message: ToServer) -> None:
        if self.error is None:
            self._write(TO_SERVER.encode(message))

    def _write(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(frame(data))

    # ---- what the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its type

    def data_received(self, data: bytes) -> None:
        at_s = time.perf_counter()
        try:
            for payload in self._reader.feed(data):
                if self.error is None:
                    self._on_message(TO_CLIENT.decode(payload), at_s)
        except NodeServeError as error:
            self._fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(
            ConnectionLost("the connection to the server ended" + (f": {exc}" if exc else ""))
        )
        if not self.closed.done():
            self.closed.set_result(None)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _on_message(self, message: ToClient, at_s: float) -> None:
        if not self.welcomed.done():
            self._on_welcome(message)
            return
        match message:
            case Tokens():
                self._on_tokens(message, at_s)
            case End():
                if mailbox := self._mailboxes.pop(message.request_id, None):
                    mailbox.put(message)
            case Stats() | Health() | Audit() | Experts():
                self._on_answer(message)
            case Traced():
                self._trace.put(message)
            case Goodbye():
                self._fail(from_code(message.code, message.message))
            case Hello():
                raise ProtocolError("the server sent a second Hello")

    def _on_welcome(self, message: ToClient) -> None:
        if isinstance(message, Goodbye):
            raise from_code(message.code, message.message)
        if not isinstance(message, Hello):
            raise ProtocolError(
                f"the server's first message is {type(message).__name__}, not Hello"
            )
        if message.version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the server speaks protocol version {message.version}, this client"
                f" {PROTOCOL_VERSION}: install the same release of nodeserve on both sides"
            )
        for name, kind in WELCOME.items():
            if type(message.server.get(name)) is not kind:
                raise ProtocolError(f"the server's Hello has no {name} that is {kind.__name__}")
        self.server = message.server
        self.welcomed.set_result(None)

    def _on_tokens(self, message: Tokens, at_s: float) -> None:
        mailboxes, sleeping = self._mailboxes, self._sleeping
        for item in message.items:
            if not _is_share(item):
                raise ProtocolError("an item of Tokens is not [request_id, ids, logprobs]")
            if mailbox := mailboxes.get(item[0]):
                mailbox.add(Arrival(item[1], item[2], at_s))
                sleeping.append(mailbox)
        if not self._is_waking:
            self._wake()

    def _wake(self) -> None:
        """Some takers at a time, the others in the loop's next turns.

        A loop sends what its callbacks wrote when the turn is over. With hundreds of streams in one
        frame the first would else wait for the work of all.
        """
        sleeping = self._sleeping
        for _ in range(min(WOKEN_AT_ONCE, len(sleeping))):
            sleeping.popleft().wake()
        self._is_waking = bool(sleeping)
        if self._is_waking:
            self._loop.call_soon(self._wake)

    def _on_answer(self, message: Stats | Health | Audit | Experts) -> None:
        waiting = self._answers[type(message)]
        if not waiting:
            name = type(message).__name__
            raise ProtocolError(f"the server sent {name} that nobody asked for")
        answer = waiting.popleft()
        if not answer.done():
            answer.set_result(message[0])

    def _fail(self, error: NodeServeError) -> None:
        """The first reason ends everything that waits; later ones say nothing new."""
        if self.error is not None:
            return
        self.error = error
        if not self.welcomed.done():
            self.welcomed.set_exception(error)
        for mailbox in self._mailboxes.values():
            mailbox.put(error)
        self._mailboxes.clear()
        self._trace.put(error)
        for waiting in self._answers.values():
            for answer in waiting:
                if not answer.done():
                    answer.set_exception(error)
            waiting.clear()
        self._writable.set()
        if self._transport is not None:
            # Not close(): that would wait for a server that does not read.
            self._transport.abort()


def _is_share(item: Any) -> bool:
    """Every token passes here: a match statement would take four times as long."""
    return (
        type(item) is list
        and len(item) == 3
        and type(item[0]) is int
        and type(item[1]) is bytes
        and not len(item[1]) & 3
        and (item[2] is None or type(item[2]) is list)
    )


def encoded(request: Submit) -> bytes:
    """The message; InvalidRequest for values that no message can carry."""
    try:
        return TO_SERVER.encode(request)
    except (TypeError, ValueError, OverflowError) as problem:
        raise InvalidRequest(f"slo or priority cannot be sent: {problem}") from None


async def connect(path: Path, timeout_s: float) -> Connection:
    """A connection whose Hello has come; ConnectionLost when nobody answers."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            _, connection = await loop.create_unix_connection(Connection, str(path))
            try:
                await connection.welcomed
            except BaseException:
                await connection.close()
                raise
    except TimeoutError:
        raise ConnectionLost(
            f"the server on {path} did not answer in {timeout_s:g} s: it may still be loading"
        ) from None
    except OSError as problem:
        raise ConnectionLost(
            f"no server on {path} ({problem.strerror}): start one with `nodeserve start`"
        ) from None
    return connection
