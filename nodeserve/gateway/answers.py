"""From a request of the API to an HTTP response: starts its answers, and leaves none running.

Always true: whatever ends a response (the last token, an error, a client that hung up, a gateway
that stops) ends the requests behind it before anything else is awaited. An error before the first
token is a response of its own with its own status; one after it is the stream's last event.
"""

import asyncio
import time
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nodeserve.client import Chunk, Completion
from nodeserve.client.results import join
from nodeserve.errors import Cancelled, NodeServeError
from nodeserve.gateway.asked import Asked
from nodeserve.gateway.connection import OUTLET, Outlet
from nodeserve.gateway.engine import Engine, Prompt
from nodeserve.gateway.logprobs import TokenTexts
from nodeserve.gateway.meters import Meters, Reading
from nodeserve.gateway.shapes import Choice, Shape, compact
from nodeserve.gateway.spans import SPAN
from nodeserve.types import Sampling

EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies that would collect events
]
JSON_TYPE = (b"content-type", b"application/json")
Result = TypeVar("Result")


class Answers(Response):
    """The response to one request: all of its choices, whole or as a stream."""

    def __init__(self, engine: Engine, shape: Shape, meters: Meters) -> None:
        self._engine = engine
        self._shape = shape
        self._meters = meters
        self._began_s = time.perf_counter()
        self._asked: Asked = shape.asked
        self._choices: list[Choice] = []
        self._gone = False  # the client is

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._watch(receive))
        self._meters.open.inc()
        try:
            await self._start()
            if self._asked.stream:
                await self._stream(EventStream(send, scope[OUTLET]))
            else:
                await self._whole(send)
        except NodeServeError:
            if self._gone:
                return
            for choice in self._choices:
                choice.reading.failed()
            raise
        finally:
            self._meters.open.dec()
            watcher.cancel()
            self._abort()
            if (span := scope.get(SPAN)) is not None:
                ends = [choice.reading.ended for choice in self._choices]
                span.answers(self._shape.model, [one for one in ends if one is not None])

    async def _watch(self, receive: Receive) -> None:
        """Until the client hangs up: nobody else would notice while no token comes."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._abort()

    def _abort(self) -> None:
        """Harmless to those that have ended."""
        for choice in self._choices:
            choice.call.abort()
            choice.reading.left()

    async def _start(self) -> None:
        engine = self._engine
        asked = self._asked = await engine.settled(self._asked)
        if asked.tooling is not None:
            self._shape.style = await engine.style()
        if asked.sampling.get("logprobs") is not None:
            self._shape.texts = TokenTexts(await engine.tokenizer(), asked.ids_as_tokens)
        for prompt in await engine.prompts(asked):
            if asked.echo and prompt.text is None:
                prompt = Prompt(prompt.ids, (await engine.tokenizer()).decode(prompt.ids))
            await self._start_choices(prompt, await engine.sampling(asked, len(prompt.ids)))

    async def _start_choices(self, prompt: Prompt, sampling: Sampling) -> None:
        meters = self._meters.of(self._shape.model)
        for number in range(self._asked.n):
            if self._gone:
                raise Cancelled("the client hung up")
            call = await self._engine.start(self._asked, prompt, sampling, number)
            reading = Reading(meters, self._began_s, len(prompt.ids), self._asked.slo)
            self._choices.append(Choice(len(self._choices), prompt, call, reading))

    # ---- whole

    async def _whole(self, send: Send) -> None:
        done = await each(self._collect(choice) for choice in self._choices)
        body = compact(self._shape.whole(self._choices, done)).encode()
        headers = [JSON_TYPE, (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _collect(self, choice: Choice) -> Completion:
        parts: list[Chunk] = []
        while (chunk := await choice.call.chunk()) is not None:
            choice.reading.chunk(chunk)
            parts.append(chunk)
        if not parts or parts[-1].finish_reason is None:
            raise Cancelled("the client hung up")
        return join(parts)

    # ---- streams

    async def _stream(self, out: "EventStream") -> None:
        try:
            counts = await each(self._pump(choice, out) for choice in self._choices)
        except NodeServeError as error:
            if self._gone or not out.begun:
                raise
            for choice in self._choices:
                choice.reading.failed()
            await out.end(self._shape.failed(error))
            return
        await out.end(self._shape.ended(self._choices, sum(counts)))

    async def _pump(self, choice: Choice, out: "EventStream") -> int:
        """Write one answer's events; returns how many tokens it had."""
        call, events, count, put = choice.call, self._shape.events, choice.reading.chunk, out.put
        num_tokens = 0

        def sink(chunk: Chunk) -> None:
            count(chunk)
            put(events(choice, chunk))

        while (chunk := await call.chunk()) is not None:
            if chunk.usage is not None:
                num_tokens = chunk.usage.completion_tokens
            count(chunk)
            await out.begin()
            await out.write(events(choice, chunk))
            await call.pour(sink, out.is_ready)
        return num_tokens


class EventStream:
    """The body of a stream. Its status is sent with its first event."""

    def __init__(self, send: Send, outlet: Outlet) -> None:
        self._send = send
        self.is_ready = outlet.is_ready
        self.put = outlet.put  # once it has begun
        self.write = outlet.write  # likewise; waits while the client reads too slowly
        self.begun = False

    async def begin(self) -> None:
        if not self.begun:
            self.begun = True
            start = {"type": "http.response.start", "status": 200, "headers": EVENT_HEADERS}
            await self._send(start)

    async def end(self, data: bytes) -> None:
        await self.begin()
        await self._send({"type": "http.response.body", "body": data, "more_body": False})


async def each(work: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All at once; the first failure ends the others and is raised as it is."""
    first, *others = work
    if not others:
        return [await first]
    tasks = [asyncio.ensure_future(one) for one in (first, *others)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
