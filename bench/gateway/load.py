"""HTTP clients that cost little: they count events and note when their bytes were read."""

import asyncio
import json
import re
import time
from typing import Any, cast

# In each event: tokens so far. So a token's time is known where an event brings several.
COUNT = re.compile(rb'"completion_tokens":(\d+)')
END = b"0\r\n\r\n"


def post(body: dict[str, Any]) -> bytes:
    """A whole request to /v1/completions."""
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


class StreamClient(asyncio.Protocol):
    """One streamed completion of the prompt [number]."""

    def __init__(self, number: int, num_tokens: int) -> None:
        self.number = number
        self.times: list[float] = []  # of each token
        self.num_events = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        body = {"prompt": [number, 5, 6], "max_tokens": num_tokens, "ignore_eos": True}
        options = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
        self._request = post({**body, **options})
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        at_s = time.perf_counter()
        events, _, self._tail = (self._tail + data).rpartition(b"\n\n")
        for count in COUNT.findall(events):
            self.num_events += 1
            self.times += [at_s] * (int(count) - len(self.times))
        if data.endswith(END):
            self._transport.close()
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(f"a stream broke: {self._tail!r}"))


class RequestClient(asyncio.Protocol):
    """Short completions, one after the other on one connection."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._request = post({"prompt": [7, 8, 9], "max_tokens": 1, "ignore_eos": True})
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not data.endswith(b"}"):
            return  # the head, or a part
        self._left -= 1
        if self._left:
            self._transport.write(self._request)
        else:
            self._transport.close()
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError("a connection broke"))
