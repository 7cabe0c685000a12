"""HTTP clients that cost little: they count events and note when their bytes came.

A token's time is the kernel's, who stamps what arrives on a TCP connection, so that a client which
has no core for a while reads late and measures right. On a Unix socket it is the time of the read.
"""

import asyncio
import json
import re
import socket
import struct
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

# In each event: tokens so far. So a token's time is known where an event brings several.
COUNT = re.compile(rb'"completion_tokens":(\d+)')
END = b"0\r\n\r\n"
STAMPS = 35  # SO_TIMESTAMPNS, and the kind of message that carries one
MAX_READ_BYTES = 1 << 16
WARM_UP = 0.25  # of a stream's tokens, before it counts as running
Address = int | Path  # a port of this machine, or a Unix socket


def post(body: dict[str, Any]) -> bytes:
    """A whole request to /v1/completions."""
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def clock_of_day() -> float:
    """By how much the kernel's stamps, which are the day's, are ahead of perf_counter: microseconds
    a minute more or less. Of several looks the one that nothing interrupted."""
    looks = []
    for _ in range(20):
        before_s, day_s, after_s = time.perf_counter(), time.time(), time.perf_counter()
        looks.append((after_s - before_s, day_s - (before_s + after_s) / 2))
    return min(looks)[1]


class Client(ABC):
    """One connection."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self._loop.create_future()

    async def start(self, address: Address, day_s: float) -> None:
        """Connect and ask. `day_s`: see `clock_of_day`."""
        self._day_s = day_s
        is_path = isinstance(address, Path)
        self._socket = socket.socket(socket.AF_UNIX if is_path else socket.AF_INET)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, STAMPS, 1)
        await self._loop.sock_connect(
            self._socket, str(address) if is_path else ("127.0.0.1", address)
        )
        self._loop.add_reader(self._socket, self._read)
        self._socket.send(self._request)

    def _read(self) -> None:
        data, stamps, _, _ = self._socket.recvmsg(MAX_READ_BYTES, 64)
        at_s = time.perf_counter()
        if not data:
            self.close()
            self.done.set_exception(RuntimeError("a connection broke"))
            return
        for _, kind, stamp in stamps:
            if kind == STAMPS:
                whole_s, nanoseconds = struct.unpack("qq", stamp)
                at_s = whole_s + 1e-9 * nanoseconds - self._day_s
        self.received(data, at_s)

    @abstractmethod
    def received(self, data: bytes, at_s: float) -> None:
        """What came, and when."""

    def close(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def finish(self) -> None:
        self.close()
        self.done.set_result(None)


class StreamClient(Client):
    """One streamed completion of the prompt [number]."""

    def __init__(self, number: int, num_tokens: int) -> None:
        self.number = number
        self.times: list[float] = []  # of each token
        self.events: list[float] = []
        usage = {"include_usage": True, "continuous_usage_stats": True}
        body = {"prompt": [number, 5, 6], "max_tokens": num_tokens, "ignore_eos": True}
        super().__init__(post({**body, "stream": True, "stream_options": usage}))
        self.warm: asyncio.Future[None] = self._loop.create_future()
        self._tail = b""
        self._num_early = WARM_UP * num_tokens

    def received(self, data: bytes, at_s: float) -> None:
        events, _, self._tail = (self._tail + data).rpartition(b"\n\n")
        for count in COUNT.findall(events):
            if (num_new := int(count) - len(self.times)) > 0:  # the last says it once more
                self.events.append(at_s)
                self.times += [at_s] * num_new
        if len(self.times) >= self._num_early and not self.warm.done():
            self.warm.set_result(None)
        if data.endswith(END):
            self.finish()


class RequestClient(Client):
    """Short completions, one after the other on one connection."""

    def __init__(self, count: int) -> None:
        self._left = count
        super().__init__(post({"prompt": [7, 8, 9], "max_tokens": 1, "ignore_eos": True}))

    def received(self, data: bytes, at_s: float) -> None:
        if not data.endswith(b"}"):
            return  # the head, or a part
        self._left -= 1
        if self._left:
            self._socket.send(self._request)
        else:
            self.finish()
