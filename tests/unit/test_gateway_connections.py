"""What strangers may send to the gateway before anything is a request: bounded in size and time."""

import asyncio
import json
from pathlib import Path

import pytest

from nodeserve.gateway import connection
from nodeserve.gateway.connection import MAX_HEAD_BYTES
from nodeserve.wire.messages import Submit
from tests.fakes.server import FakeServer, Peer, saying
from tests.unit.test_gateway import http

__all__ = ["http"]  # a fixture
LINE = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
END = b"\r\n0\r\n\r\n"


def post(**body: object) -> bytes:
    data = json.dumps({"prompt": "x", **body}).encode()
    return LINE + b"Content-Length: %d\r\n\r\n%b" % (len(data), data)


async def answers(path: Path, *parts: bytes) -> bytes:
    """All that comes for these, each of them written when the one before it was read."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def problem_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head and head.count(b"HTTP/1.1") == 1
    return int(head.split()[1]), json.loads(body)["error"]["code"]


@pytest.mark.parametrize(
    "parts",
    [
        [LINE + b"a: " + b"b" * 2 * MAX_HEAD_BYTES + b"\r\n\r\n"],
        [LINE, *[b"a: b\r\n" * 1000] * 20],
        [LINE + b"a: ", *[b"b" * 1000] * 70],
        [b"GET /" + b"b" * 2 * MAX_HEAD_BYTES],
    ],
    ids=["one", "many", "one in parts", "the path"],
)
async def test_a_heads_size_has_a_limit(http: Path, parts: list[bytes]) -> None:
    answer = await answers(http, *parts)
    assert not answer or problem_of(answer) == (431, "head_too_large")


async def test_a_head_that_is_too_large_is_told_so(http: Path) -> None:
    """Where nothing is left unread, which would make the kernel forget what was written."""
    answer = await answers(http, LINE + b"a: " + b"b" * MAX_HEAD_BYTES + b"\r\n\r\n")
    assert problem_of(answer) == (431, "head_too_large")


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02", LINE + b"Content-Length: -5\r\n\r\n"])
async def test_what_is_no_request(http: Path, sent: bytes) -> None:
    assert problem_of(await answers(http, sent)) == (400, "invalid_http")


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"POS", LINE])
async def test_a_head_that_does_not_come_is_given_up(
    http: Path, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.01)
    assert await answers(http, sent) == b""


async def test_a_head_after_an_answer_is_given_up_too(
    server: FakeServer, http: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.2)
    server.script = saying("ab")
    answer = await answers(http, post(), LINE)
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"}")


async def test_a_large_body_is_no_head(server: FakeServer, http: Path) -> None:
    server.script = saying("ab")
    large = post(unknown="x" * 3 * MAX_HEAD_BYTES)
    last = post().replace(b"Host: x", b"Connection: close")
    answer = await answers(http, large + last[:20], last[20:])
    assert answer.count(b"HTTP/1.1 200") == 2


class Waiting:
    """Answers with a token, and with another one and the end when told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def __call__(self, peer: Peer, submit: Submit) -> None:
        peer.tokens(submit.request_id, [ord("a")])
        await self.go.wait()
        peer.tokens(submit.request_id, [ord("b")])
        peer.end(submit, "length", 2)


async def test_half_a_head_behind_a_stream_does_not_cut_it(
    server: FakeServer, http: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script = script = Waiting()
    late = asyncio.Event()
    is_late = connection.HttpConnection._head_is_late

    def tell(self: connection.HttpConnection) -> None:
        is_late(self)
        late.set()

    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.2)
    monkeypatch.setattr(connection.HttpConnection, "_head_is_late", tell)
    reader, writer = await asyncio.open_unix_connection(http)
    writer.write(post(stream=True))
    await reader.readuntil(b'"text":"a"')
    assert not late.is_set()
    writer.write(LINE)
    await late.wait()
    script.go.set()
    assert b'"text":"b"' in await reader.readuntil(END)
    assert await reader.read() == b"", "and then it is given up"
    writer.close()


@pytest.mark.parametrize("rest", [b"", b"\r\n"])
async def test_a_connection_between_requests_waits_for_no_head(
    server: FakeServer, http: Path, monkeypatch: pytest.MonkeyPatch, rest: bytes
) -> None:
    """It is kept alive, which is longer; unless something came that is no head."""
    server.script = saying("ab")
    expected: list[bool] = []
    expect = connection.HttpConnection._expect_head
    more = asyncio.Event()

    def tell(self: connection.HttpConnection, on: bool = True) -> None:
        expect(self, on)
        expected.append(on)
        if len(expected) > 2:
            more.set()

    monkeypatch.setattr(connection.HttpConnection, "_expect_head", tell)
    reader, writer = await asyncio.open_unix_connection(http)
    writer.write(post())
    await reader.readuntil(b'"total_tokens"')
    seen = expected[:]
    if rest:
        writer.write(rest)
        await more.wait()
    writer.close()
    assert seen == [True, False]


async def test_no_answer_is_written_into_another(server: FakeServer, http: Path) -> None:
    server.script = Waiting()
    reader, writer = await asyncio.open_unix_connection(http)
    writer.write(post(stream=True))
    begun = await reader.readuntil(b'"text":"a"')
    assert begun.count(b"HTTP/1.1") == 1
    writer.write(b"\x16\x03\x01\x02")
    assert b"HTTP/1.1" not in await reader.read()
    writer.close()
