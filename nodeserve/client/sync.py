"""The blocking client: an AsyncClient on an event loop of its own, in one daemon thread.

Any number of threads may use one Client at once; their requests share its connection. A thread that
is interrupted while it waits (Ctrl-C) cancels what it waited for.
"""

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Coroutine, Generator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from nodeserve.client.aio import (
    CONNECT_TIMEOUT_S,
    HEALTH_TIMEOUT_S,
    AsyncClient,
    Call,
    Message,
    whole,
)
from nodeserve.client.results import Audit, Chunk, Completion, Health
from nodeserve.errors import ConnectionLost
from nodeserve.text import Tokenizer

Result = TypeVar("Result")
CLOSE_TIMEOUT_S = 0.5


class Client:
    """As AsyncClient, for code without an event loop. Options and policy: see there."""

    def __init__(
        self,
        socket_path: str | os.PathLike[str] | None = None,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        self._client = AsyncClient(socket_path, connect_timeout_s=connect_timeout_s)
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def socket_path(self) -> Path:
        return self._client.socket_path

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and end the thread. What still runs raises ConnectionLost."""
        with self._lock:
            loop, thread, self._closed = self._loop, self._thread, True
            self._loop = self._thread = None
        if loop is not None and thread is not None:
            asyncio.run_coroutine_threadsafe(_wind_down(self._client), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    # ---- requests

    @overload
    def generate(
        self, prompt: str | Sequence[int], *, stream: Literal[False] = False, **options: Any
    ) -> Completion: ...

    @overload
    def generate(
        self, prompt: str | Sequence[int], *, stream: Literal[True], **options: Any
    ) -> Generator[Chunk, None, None]: ...

    def generate(
        self, prompt: str | Sequence[int], *, stream: bool = False, **options: Any
    ) -> Completion | Generator[Chunk, None, None]:
        """Complete a text or a list of token ids; options as `AsyncClient.start` names them.

        With `stream=True` the request is sent at once, iterating gives its chunks.
        """
        if stream:
            return self._stream(prompt, options)
        return self._wait(whole(self._client, prompt, options))

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[False] = False, **options: Any
    ) -> Completion: ...

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[True], **options: Any
    ) -> Generator[Chunk, None, None]: ...

    def chat(
        self, messages: Sequence[Message], *, stream: bool = False, **options: Any
    ) -> Completion | Generator[Chunk, None, None]:
        """Answer a conversation ({"role": ..., "content": ...} each), by the chat template."""
        options["messages"] = messages
        if stream:
            return self._stream(None, options)
        return self._wait(whole(self._client, None, options))

    # ---- the server

    def server(self) -> dict[str, Any]:
        """What the server says about itself: model, tokenizer, limits, layout, pid, version."""
        return self._wait(self._client.server())

    def health(self, timeout_s: float = HEALTH_TIMEOUT_S) -> Health:
        """As AsyncClient's."""
        return self._wait(self._client.health(timeout_s))

    def audit(self) -> Audit:
        """As AsyncClient's."""
        return self._wait(self._client.audit())

    def experts(self) -> dict[str, Any]:
        """As AsyncClient's."""
        return self._wait(self._client.experts())

    def stats(self) -> dict[str, Any]:
        """Queues, rates and workers, as docs/protocol.md lists them."""
        return self._wait(self._client.stats())

    def stop_server(self, *, drain: bool = False, timeout_s: float | None = None) -> bool:
        """As AsyncClient's."""
        return self._wait(self._client.stop_server(drain=drain, timeout_s=timeout_s))

    def tokenizer(self) -> Tokenizer:
        """The served model's tokenizer, loaded when first needed."""
        return self._wait(self._client.tokenizer())

    # ---- inside

    def _stream(
        self, prompt: str | Sequence[int] | None, options: dict[str, Any]
    ) -> Generator[Chunk, None, None]:
        call = self._wait(self._client.start(prompt, **options))
        chunks = self._chunks(call)
        next(chunks)  # into its `try`: from here on dropping the generator aborts the request
        return chunks

    def _chunks(self, call: Call) -> Generator[Chunk, None, None]:
        try:
            yield Chunk()
            while (chunk := self._wait(call.chunk())) is not None:
                yield chunk
        finally:
            self._leave(call)

    def _leave(self, call: Call) -> None:
        """Abort without waiting: this may run in the garbage collector, in any thread."""
        loop = self._loop
        if loop is not None:
            loop.call_soon_threadsafe(call.abort)

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        try:
            loop = self._running_loop()
        except BaseException:
            work.close()
            raise
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise ConnectionLost("the client was closed") from None
        except BaseException:
            future.cancel()
            raise

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._closed:
                raise ConnectionLost("this client is closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="nodeserve-client", daemon=True
                )
                self._thread.start()
            return self._loop


async def _wind_down(client: AsyncClient) -> None:
    """Close the connection, let what waited for it see that, cancel what waits for other things."""
    await client.aclose()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        _, late = await asyncio.wait(others, timeout=CLOSE_TIMEOUT_S)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_default_executor()
