"""Streams of the gateway to clients that read slowly, or no more."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nodeserve.gateway.settings import GatewaySettings
from nodeserve.wire.messages import Abort, Submit
from tests.fakes.gateway import events_of, gateway_on, http_client
from tests.fakes.server import FakeServer, Peer

COUNT = 5000  # tokens, whose events are far more than all buffers hold
LETTERS = b"abcdefghijklmnopqrstuvwxyz"
TEXT = bytes(LETTERS[number % len(LETTERS)] for number in range(COUNT)).decode()


class Writer:
    """Answers with TEXT, each token in a frame of its own and in a turn of its own."""

    def __init__(self, ends: bool) -> None:
        self.ends = ends
        self.done = asyncio.Event()

    async def __call__(self, peer: Peer, submit: Submit) -> None:
        for letter in TEXT.encode():
            peer.tokens(submit.request_id, [letter])
            await asyncio.sleep(0)
        if self.ends:
            peer.end(submit, "length", COUNT)
        self.done.set()


@pytest.fixture
async def http(server: FakeServer, tmp_path: Path) -> AsyncIterator[Path]:
    path = tmp_path / "http"
    async with gateway_on(path, GatewaySettings(socket=str(server.path))):
        yield path


@contextlib.asynccontextmanager
async def unread(server: FakeServer, path: Path, ends: bool) -> AsyncIterator[socket.socket]:
    """The connection of a stream of which nothing is read; all of it has come to the gateway."""
    server.script = writer = Writer(ends)
    loop = asyncio.get_running_loop()
    body = json.dumps({"prompt": "x", "max_tokens": COUNT, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)
        await loop.sock_connect(client, str(path))
        await loop.sock_sendall(client, head.encode() + body)
        await writer.done.wait()
        async with http_client(path) as other:  # what the server says comes in its order
            assert (await other.get("/ready")).status_code == 200
        yield client


async def body_of(client: socket.socket) -> bytes:
    """The rest of a chunked response."""
    loop, data = asyncio.get_running_loop(), b""
    while not data.endswith(b"\r\n0\r\n\r\n"):
        data += await loop.sock_recv(client, 1 << 20)
    body, at = [], data.index(b"\r\n\r\n") + 4
    while not data.startswith(b"0\r\n\r\n", at):
        begin = data.index(b"\r\n", at) + 2
        end = begin + int(data[at : begin - 2], 16)
        body.append(data[begin:end])
        assert data.startswith(b"\r\n", end)
        at = end + 2
    return b"".join(body)


async def test_what_a_slow_reader_misses_is_joined(server: FakeServer, http: Path) -> None:
    """It gets every token in its order, and the gateway keeps no event for each."""
    async with unread(server, http, ends=True) as client:
        events = list(events_of(await body_of(client)))
    choices = [event["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == TEXT
    assert choices[-1]["finish_reason"] == "length"
    lengths = [len(choice["text"]) for choice in choices]
    assert lengths[5:100] == [1] * 95, "as they came, until its buffers were full"
    assert max(lengths) > COUNT // 2, "and the others together"
    assert server.count(Abort) == 0


async def test_a_slow_reader_that_leaves_is_noticed(server: FakeServer, http: Path) -> None:
    async with unread(server, http, ends=False):
        assert server.count(Abort) == 0
    await server.until_received(Abort)
