"""A server that answers on an exact schedule and remembers when it really did, in both protocols.

The answer to a request is decided by its number of output tokens and by the place in the order of
requests: `Schedule` says when tokens go out, after the request has come. `Told` has the times that
a perfect client would measure: those of the bytes going out.
"""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nodeserve.wire.messages import Submit, unpack_ids
from tests.fakes.server import Peer

Delays = Callable[[int, int], list[float]]  # place, tokens: seconds from request to each token


@dataclass
class Told:
    """One request as the server saw it."""

    came_s: float
    num_prompt_tokens: int
    body: dict[str, Any] = field(default_factory=dict)
    sent_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.sent_s[0] - self.came_s

    @property
    def tpot_s(self) -> float:
        return (self.sent_s[-1] - self.sent_s[0]) / (len(self.sent_s) - 1)


def steady(ttft_s: float, tpot_s: float) -> Delays:
    return lambda place, num: [ttft_s + tpot_s * token for token in range(num)]


async def play(told: Told, delays: list[float], send: Callable[[int], None]) -> None:
    """Call `send` with each token's place at its time."""
    for place, delay_s in enumerate(delays):
        await asyncio.sleep(told.came_s + delay_s - time.perf_counter())
        told.sent_s.append(time.perf_counter())
        send(place)


class SocketScript:
    """A script for `FakeServer`."""

    def __init__(self, delays: Delays) -> None:
        self.delays = delays
        self.told: list[Told] = []

    async def __call__(self, peer: Peer, submit: Submit) -> None:
        told = Told(time.perf_counter(), len(unpack_ids(submit.token_ids)))
        self.told.append(told)
        num = submit.sampling["max_tokens"]
        await play(
            told,
            self.delays(len(self.told) - 1, num),
            lambda place: peer.tokens(submit.request_id, [place]),
        )
        peer.end(submit, "length", num)


class OpenAIServer:
    """`async with OpenAIServer(delays) as server`: /v1/models, /v1/completions, chat completions.

    `status` other than 200 refuses all requests; `cut_after` ends connections after so many tokens.
    """

    def __init__(
        self, delays: Delays, status: int = 200, cut_after: int | None = None, port: int = 0
    ) -> None:
        self.port = port  # 0: any
        self.delays = delays
        self.status = status
        self.cut_after = cut_after
        self.told: list[Told] = []
        self.num_connections = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "OpenAIServer":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                came_s = time.perf_counter()
                lines = head.decode().split("\r\n")
                lengths = [x[15:] for x in lines if x.lower().startswith("content-length")]
                body = await reader.readexactly(sum(map(int, lengths)))
                await self._answer(lines[0].split()[1], body, came_s, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(
        self, route: str, body: bytes, came_s: float, writer: asyncio.StreamWriter
    ) -> None:
        if route == "/v1/models":
            self._whole(writer, 200, {"data": [{"id": "known", "max_model_len": 4096}]})
        elif self.status != 200:
            self._whole(writer, self.status, {"error": {"message": "no room"}})
        else:
            request = json.loads(body)
            prompt = request.get("prompt") or request["messages"][0]["content"].split()
            told = Told(came_s, len(prompt), request)
            self.told.append(told)
            await self._stream(told, "chat" in route, writer)

    def _whole(self, writer: asyncio.StreamWriter, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        writer.write(b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n%s" % (status, len(data), data))

    async def _stream(self, told: Told, chat: bool, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )

        def event(value: Any) -> None:
            data = f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))

        num = told.body["max_tokens"]
        if chat:
            event({"choices": [{"delta": {"role": "assistant", "content": ""}, "index": 0}]})

        def send(place: int) -> None:
            if place == self.cut_after:
                writer.close()
                raise ConnectionResetError
            last = "length" if place == num - 1 else None
            text: dict[str, Any] = {"delta": {"content": "x"}} if chat else {"text": "x"}
            event({"choices": [{**text, "index": 0, "finish_reason": last}], "usage": None})

        await play(told, self.delays(len(self.told) - 1, num), send)
        counts = {"prompt_tokens": told.num_prompt_tokens, "completion_tokens": num}
        event({"choices": [], "usage": counts})
        event("[DONE]")
        writer.write(b"0\r\n\r\n")
