"""The asyncio client.

Reconnect policy: the connection is made by the first call that needs one. When it is lost, every
request on it raises ConnectionLost (or the reason that the server gave), and the next call tries
once to connect again. A request is never sent twice: only its caller knows whether that is right.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from nodeserve.client.answer import Answer, merge
from nodeserve.client.connection import Arrival, Connection, Event, connect
from nodeserve.client.mailbox import Mailbox
from nodeserve.client.results import Audit, Chunk, Completion, Health, join
from nodeserve.errors import Cancelled, ConnectionLost, InvalidRequest, NodeServeError
from nodeserve.socket_path import socket_path as find_socket
from nodeserve.text import Detokenizer, StopStrings, Tokenizer
from nodeserve.text.constraints import check, constraint_of
from nodeserve.types import (
    Sampling,
    check_priority,
    check_sampling,
    sampling_from,
    sampling_to,
)
from nodeserve.wire.messages import End, pack_ids

Message = Mapping[str, Any]
CONNECT_TIMEOUT_S = 30.0
HEALTH_TIMEOUT_S = 3.0  # a server that lives answers in milliseconds


class Call:
    """One running request: ask for chunks until None, or abort."""

    def __init__(
        self, connection: Connection, request_id: int, mailbox: Mailbox[Event], answer: Answer
    ) -> None:
        self._connection = connection
        self._request_id = request_id
        self._mailbox = mailbox
        self._answer = answer
        self._ended = False
        self._failure: NodeServeError | None = None

    async def chunk(self) -> Chunk | None:
        """What came since the last one, at least something; None after the last."""
        if self._failure is not None:
            raise self._failure
        if self._ended:
            return None
        events = await self._mailbox.take()
        last = events[-1]
        if isinstance(last, Arrival):  # then all are: an end is the last
            chunk = self._answer.add(events)  # type: ignore[arg-type]
            if not self._answer.stopped:
                return chunk
            self._connection.abort(self._request_id)
            last = await self._end()
        else:
            chunk = self._answer.add([event for event in events if isinstance(event, Arrival)])
        self._ended = True
        try:
            return merge(chunk, self._last(last))
        except NodeServeError as error:
            if not chunk.token_ids:
                raise
            self._failure = error  # after the tokens that came before it
            return chunk

    async def pour(self, sink: Callable[[Chunk], None], ready: Callable[[], bool]) -> None:
        """Give `sink` what comes in the turn of the loop that brings it, with no task between, as
        long as `ready`. What follows is for chunk(): always the last one, and every one of an
        answer with stop strings."""
        if self._ended or self._failure is not None or self._answer.may_stop:
            return
        add = self._answer.add

        def offer(events: list[Event]) -> bool:
            if type(events[-1]) is not Arrival or not ready():
                return False
            sink(add(events))  # type: ignore[arg-type]  # an end is the last
            return True

        await self._mailbox.pour(offer)

    def abort(self) -> None:
        """Leave the request; the server frees all it holds. Harmless after the end."""
        self._ended = True
        self._connection.forget(self._request_id)
        self._mailbox.put(Cancelled("the request was left"))  # for a chunk() still waiting

    async def _end(self) -> End | NodeServeError:
        while isinstance(last := (await self._mailbox.take())[-1], Arrival):
            pass  # tokens that were under way when the abort was sent
        return last

    def _last(self, event: End | NodeServeError) -> Chunk:
        if isinstance(event, End):
            return self._answer.finish(event)
        if self._answer.stopped:
            return self._answer.finish_without_end()
        raise event


class AsyncClient:
    """Many requests at once over one connection, from the tasks of one event loop.

    `socket_path=None` looks where `nodeserve start` puts the socket. Nothing is connected or loaded
    before a call needs it. Leaving a request in any way (break, cancellation, an exception) cancels
    it on the server.
    """

    def __init__(
        self,
        socket_path: str | os.PathLike[str] | None = None,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        self.socket_path: Path = find_socket(socket_path, os.environ)
        self._connect_timeout_s = connect_timeout_s
        self._connection: Connection | None = None
        self._attempt: asyncio.Task[Connection] | None = None
        self._tokenizer: Tokenizer | None = None
        self._loading = asyncio.Lock()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection; what still runs raises ConnectionLost. The client stays usable."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    # ---- requests

    @overload
    def generate(
        self, prompt: str | Sequence[int], *, stream: Literal[False] = False, **options: Any
    ) -> Coroutine[Any, Any, Completion]: ...

    @overload
    def generate(
        self, prompt: str | Sequence[int], *, stream: Literal[True], **options: Any
    ) -> AsyncGenerator[Chunk, None]: ...

    def generate(
        self, prompt: str | Sequence[int], *, stream: bool = False, **options: Any
    ) -> Coroutine[Any, Any, Completion] | AsyncGenerator[Chunk, None]:
        """Complete a text or a list of token ids.

        Await it, or with `stream=True` iterate over it: `async for chunk in generate(...)`. The
        options are those of `start`.
        """
        return chunks(self, prompt, options) if stream else whole(self, prompt, options)

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[False] = False, **options: Any
    ) -> Coroutine[Any, Any, Completion]: ...

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[True], **options: Any
    ) -> AsyncGenerator[Chunk, None]: ...

    def chat(
        self, messages: Sequence[Message], *, stream: bool = False, **options: Any
    ) -> Coroutine[Any, Any, Completion] | AsyncGenerator[Chunk, None]:
        """Answer a conversation ({"role": ..., "content": ...} each), by the chat template."""
        options["messages"] = messages
        return chunks(self, None, options) if stream else whole(self, None, options)

    async def start(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[Message] | None = None,
        stop: str | Sequence[str] = (),
        detokenize: bool = True,
        slo: Mapping[str, float] | None = None,
        priority: int = 0,
        **sampling: Any,
    ) -> Call:
        """Send one request, a prompt or messages, and return it running.

        Every field of `types.Sampling` is a keyword. `constraint` also has the forms that
        `text.constraints.constraint_of` takes: `constraint={"json_schema": {...}}` gives JSON that
        the schema allows. `stop` strings end the answer before themselves. `slo` has `ttft_ms` and
        `tpot_ms`; a higher `priority` is served earlier.
        `detokenize=False` with a prompt of token ids needs no tokenizer and leaves `text` empty.
        """
        if sampling.get("constraint") is not None:
            sampling["constraint"] = constraint = constraint_of(sampling["constraint"])
            await asyncio.to_thread(check, constraint)
        settings = sampling_from(sampling)
        check_priority(priority)
        stops = StopStrings(stop) if stop else None
        if stops is not None and not detokenize:
            raise InvalidRequest("stop strings need detokenize=True; use stop_token_ids without")
        connection = await self.connection()
        check_sampling(settings, connection.server["vocab_size"])
        ids = await self._token_ids(prompt, messages)
        detokenizer = None
        if detokenize:
            tokenizer = await self.tokenizer()
            detokenizer = Detokenizer(tokenizer, continues=messages is None)
        return await self.submit(
            ids, settings, detokenizer=detokenizer, stops=stops, slo=slo, priority=priority
        )

    async def submit(
        self,
        token_ids: bytes,
        sampling: Sampling,
        *,
        detokenizer: Detokenizer | None = None,
        stops: StopStrings | None = None,
        slo: Mapping[str, float] | None = None,
        priority: int = 0,
    ) -> Call:
        """Send what is in the protocol's form already (`pack_ids`), for callers with text of their
        own. Nothing is checked here: the server says what is wrong. Without a detokenizer chunks
        have no text and nothing stops at strings."""
        connection = await self.connection()
        answer = Answer(
            len(token_ids) // 4,
            time.perf_counter(),
            detokenizer,
            stops,
            sampling.logprobs is not None,
        )
        request_id, mailbox = await connection.submit(
            token_ids, sampling_to(sampling), None if slo is None else dict(slo), priority
        )
        return Call(connection, request_id, mailbox, answer)

    # ---- the server

    async def server(self) -> dict[str, Any]:
        """What the server says about itself: model, tokenizer, limits, layout, pid, version."""
        return dict((await self.connection()).server)

    async def health(self, timeout_s: float = HEALTH_TIMEOUT_S) -> Health:
        """Whether it serves, and if not, why not. ConnectionLost: it does not even answer."""
        connection = await self.connection()
        try:
            async with asyncio.timeout(timeout_s):
                told = await connection.health()
        except TimeoutError:
            raise ConnectionLost(
                f"the server on {self.socket_path} did not answer in {timeout_s:g} s"
            ) from None
        return Health(
            str(told.get("state", "")),
            told.get("ready") is True,
            tuple(map(str, told.get("reasons", ()))),
            float(told.get("loop_lag_ms", 0.0)) / 1e3,
        )

    async def audit(self) -> Audit:
        """Compare the server's books with what each worker counts anew; any time will do."""
        told = await (await self.connection()).audit()
        return Audit(tuple(told["problems"]), told["requests"], told["workers"])

    async def experts(self) -> dict[str, Any]:
        """Where rows of ranks that share experts went, as docs/protocol.md lists it."""
        return await (await self.connection()).experts()

    async def stats(self) -> dict[str, Any]:
        """Queues, rates and workers, as docs/protocol.md lists them."""
        return await (await self.connection()).stats()

    async def stop_server(self, *, drain: bool = False, timeout_s: float | None = None) -> bool:
        """Stop the server and wait until it closes the connection.

        With `drain` it finishes what runs first. What still runs after `timeout_s`, or after the
        server's own limit, is ended; False if that was after `timeout_s`.
        """
        connection = await self.connection()
        connection.stop_server(drain)
        done, _ = await asyncio.wait([connection.closed], timeout=timeout_s if drain else None)
        if not done:
            connection.stop_server(False)
            await asyncio.wait([connection.closed])
        return bool(done)

    async def connection(self) -> Connection:
        """The connection, made or made again when needed. For code that speaks the protocol.

        Whoever needs one while it is being made waits for the same attempt and has its outcome: a
        server that does not answer costs many callers the timeout once and not one after another.
        """
        if self._connection is not None and self._connection.usable:
            return self._connection
        if self._attempt is None:
            self._attempt = asyncio.create_task(self._connect())
            self._attempt.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return await asyncio.shield(self._attempt)  # a caller that leaves takes it from nobody

    async def _connect(self) -> Connection:
        try:
            self._connection = await connect(self.socket_path, self._connect_timeout_s)
            return self._connection
        finally:
            self._attempt = None

    async def tokenizer(self) -> Tokenizer:
        """The served model's tokenizer, loaded when first needed."""
        location = (await self.connection()).server["tokenizer"]
        if self._tokenizer is not None and self._tokenizer.location == location:
            return self._tokenizer
        async with self._loading:
            if self._tokenizer is None or self._tokenizer.location != location:
                self._tokenizer = await asyncio.to_thread(Tokenizer.load, location)
            return self._tokenizer

    # ---- inside

    async def _token_ids(
        self, prompt: str | Sequence[int] | None, messages: Sequence[Message] | None
    ) -> bytes:
        if messages is not None:
            tokenizer = await self.tokenizer()
            text = tokenizer.chat_prompt(messages)
            return pack_ids(tokenizer.encode(text, add_special=False))
        if isinstance(prompt, str):
            return pack_ids((await self.tokenizer()).encode(prompt))
        try:
            if prompt is not None and not isinstance(prompt, bytes | bytearray):
                return pack_ids(prompt)
        except (TypeError, OverflowError):
            pass
        raise InvalidRequest("prompt must be text or a list of token ids (32-bit integers)")


async def chunks(
    client: AsyncClient, prompt: str | Sequence[int] | None, options: dict[str, Any]
) -> AsyncGenerator[Chunk, None]:
    """One request from start to end; leaving it in between aborts it."""
    call = await client.start(prompt, **options)
    try:
        while (chunk := await call.chunk()) is not None:
            yield chunk
    finally:
        call.abort()


async def whole(
    client: AsyncClient, prompt: str | Sequence[int] | None, options: dict[str, Any]
) -> Completion:
    """One request, awaited; cancelling the wait aborts it."""
    async with contextlib.aclosing(chunks(client, prompt, options)) as parts:
        return join([chunk async for chunk in parts])
