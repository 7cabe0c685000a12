"""The HTTP client against servers that say what they please, byte by byte."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Sequence

import pytest

from nodeserve.errors import ConnectionLost, NodeServeError, ProtocolError
from nodeserve.loadgen.http_client import HttpClient, parse_url
from tests.patience import PATIENCE_S

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
WHOLE = CHUNKED + b"5\r\nhello\r\n7;note=x\r\n, world\r\n0\r\nTrailer: 1\r\n\r\n"
SIZED = b"HTTP/1.1 404 Not Found\r\nContent-Length: 12\r\nX-A: b: c\r\n\r\nhello, world"
NO_LENGTH = b"HTTP/1.0 200 OK\r\nServer: x\r\n\r\nhello, world"
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
MOVED = b"HTTP/1.1 307 x\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n"


class RawServer:
    """Answers each request with `pieces`; ends the connection after them unless `stays`."""

    def __init__(self, pieces: Sequence[bytes], stays: bool = True) -> None:
        self.pieces = pieces
        self.stays = stays
        self.heads: list[str] = []
        self.num_connections = 0
        self.left = asyncio.Event()
        self.holds_until = 0  # requests that must have come before any is answered
        self._enough = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                self.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
                if len(self.heads) >= self.holds_until:
                    self._enough.set()
                await self._enough.wait()
                for piece in self.pieces:
                    writer.write(piece)
                    await asyncio.sleep(0)
                if not self.stays:
                    break
        if self.stays:
            self.left.set()
        writer.close()


@contextlib.asynccontextmanager
async def client_of(
    server: RawServer, headers: dict[str, str] | None = None
) -> AsyncIterator[HttpClient]:
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, backlog=256)
    port = listening.sockets[0].getsockname()[1]
    client = HttpClient(parse_url(f"http://127.0.0.1:{port}/pre/v1"), headers or {}, 5.0)
    try:
        yield client
    finally:
        await client.close()
        listening.close()
        await listening.wait_closed()


async def get(client: HttpClient) -> tuple[int, bytes]:
    body: list[bytes] = []
    status = await client.exchange("GET", "v1/models", lambda data, _: body.append(data))
    return status, b"".join(body)


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(("answer", "status"), [(WHOLE, 200), (SIZED, 404), (INTERIM + SIZED, 404)])
async def test_answers_in_pieces_on_one_connection(answer: bytes, status: int, size: int) -> None:
    pieces = [answer[place : place + size] for place in range(0, len(answer), size)]
    server = RawServer(pieces)
    async with client_of(server) as client:
        for _ in range(3):
            assert await get(client) == (status, b"hello, world")
    assert server.num_connections == 1 and len(server.heads) == 3


async def test_a_body_without_length_ends_with_the_connection() -> None:
    server = RawServer([NO_LENGTH], stays=False)
    async with client_of(server) as client:
        assert await get(client) == (200, b"hello, world")
        assert await get(client) == (200, b"hello, world")
    assert server.num_connections == 2


async def test_what_is_sent() -> None:
    server = RawServer([WHOLE])
    async with client_of(server, {"Authorization": "Bearer k"}) as client:
        await client.exchange("POST", "v1/completions", lambda data, at_s: None, b"{}")
    first, *fields = server.heads[0].lower().split("\r\n")
    assert first == "post /pre/v1/completions http/1.1"
    assert {"authorization: bearer k", "accept-encoding: identity", "content-length: 2"} <= {
        *fields
    }


async def test_each_piece_has_the_time_at_which_it_was_read() -> None:
    """The second piece is sent when the first was handed on: no time covers both."""
    handed_on = asyncio.Event()
    seen: list[tuple[bytes, float]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(CHUNKED + b"1\r\na\r\n")
        await handed_on.wait()
        sent_s.append(time.perf_counter())
        writer.write(b"1\r\nb\r\n0\r\n\r\n")
        writer.close()

    def on_body(data: bytes, at_s: float) -> None:
        seen.append((data, at_s))
        handed_on.set()

    sent_s: list[float] = []
    server = RawServer([])
    server.serve = serve  # type: ignore[method-assign]
    async with client_of(server) as client:
        await client.exchange("GET", "", on_body)
        ended_s = time.perf_counter()
    (first, first_s), (second, second_s) = seen
    assert (first, second) == (b"a", b"b")
    assert first_s <= sent_s[0] <= second_s <= ended_s


async def test_no_request_waits_for_another() -> None:
    """None is answered before all have come, which no limited pool would survive."""
    server = RawServer([WHOLE])
    server.holds_until = 150
    async with client_of(server) as client, asyncio.timeout(PATIENCE_S):
        answers = await asyncio.gather(*(get(client) for _ in range(150)))
    assert {status for status, _ in answers} == {200} and server.num_connections == 150


async def test_redirects_are_not_followed() -> None:
    server = RawServer([MOVED])
    async with client_of(server) as client:
        assert await get(client) == (307, b"")
    assert len(server.heads) == 1


@pytest.mark.parametrize("cut", [0, 10, 40, len(CHUNKED) + 2, len(WHOLE) - 3])
async def test_an_answer_that_is_cut_is_lost_and_not_asked_again(cut: int) -> None:
    server = RawServer([WHOLE[:cut]], stays=False)
    async with client_of(server) as client:
        with pytest.raises(ConnectionLost, match="ended before the answer did"):
            await client.exchange("POST", "", lambda data, at_s: None, b"{}")
    assert len(server.heads) == 1


@pytest.mark.parametrize(
    "wrong", [b"SSH-2.0\r\n\r\n", b"HTTP/1.1 x\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000]
)
async def test_what_is_no_http(wrong: bytes) -> None:
    async with client_of(RawServer([wrong])) as client:
        with pytest.raises(ProtocolError, match="not an HTTP response"):
            await get(client)


async def test_a_wrong_chunk_ends_the_exchange() -> None:
    async with client_of(RawServer([WHOLE.replace(b"5\r\n", b"zz\r\n")])) as client:
        with pytest.raises(NodeServeError):
            await get(client)


async def test_what_on_body_raises_ends_the_exchange_and_the_connection() -> None:
    def on_body(data: bytes, at_s: float) -> None:
        raise ProtocolError("no more of this")

    server = RawServer([CHUNKED + b"5\r\nhello\r\n"])
    async with client_of(server) as client:
        with pytest.raises(ProtocolError, match="no more"):
            await client.exchange("GET", "", on_body)
        await asyncio.wait_for(server.left.wait(), PATIENCE_S)


async def test_a_cancelled_exchange_ends_the_connection() -> None:
    came = asyncio.Event()
    server = RawServer([CHUNKED + b"5\r\nhello\r\n"])
    async with client_of(server) as client:
        task = asyncio.create_task(client.exchange("GET", "", lambda data, at_s: came.set()))
        await came.wait()
        task.cancel()
        await asyncio.wait_for(server.left.wait(), PATIENCE_S)
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_who_does_not_answer_in_time() -> None:
    """A listener that accepts nothing: its queue is full, so that connecting goes on for ever."""
    with socket.socket() as listener, contextlib.ExitStack() as fillers:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        for _ in range(4):
            filler = fillers.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        client = HttpClient(parse_url(f"http://127.0.0.1:{port}"), {}, 0.05)
        with pytest.raises(ConnectionLost, match=r"did not answer in 0\.05 s"):
            await get(client)
        await client.close()


async def test_nobody_there() -> None:
    client = HttpClient(parse_url("127.0.0.1:9"), {}, 5.0)
    with pytest.raises(ConnectionLost, match="no server at http://127.0.0.1:9: "):
        await get(client)
    await client.close()
