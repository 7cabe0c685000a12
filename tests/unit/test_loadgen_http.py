"""HTTP responses and event streams, whatever pieces they come in."""

import pytest

from nodeserve.errors import ConfigError, ProtocolError
from nodeserve.loadgen.http import EventReader, ResponseReader
from nodeserve.loadgen.http_client import parse_url
from nodeserve.loadgen.openai_target import has_token, refusal

CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\n7;note=x\r\n, world\r\n0\r\nTrailer: 1\r\n\r\n"
)
SIZED = b"HTTP/1.1 404 Not Found\r\nContent-Length: 12\r\nX-A: b: c\r\n\r\nhello, world"


@pytest.mark.parametrize("response", [CHUNKED, SIZED])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_response_in_pieces(response: bytes, size: int) -> None:
    reader = ResponseReader()
    body = b""
    for place in range(0, len(response), size):
        assert not reader.ended
        body += reader.feed(response[place : place + size])
    assert body == b"hello, world" and reader.ended and reader.reusable
    assert reader.status == (404 if response is SIZED else 200)


def test_a_body_without_length_ends_with_the_connection() -> None:
    reader = ResponseReader()
    assert reader.feed(b"HTTP/1.0 200 OK\nServer: x\n\nab") == b"ab"
    assert reader.feed(b"cd") == b"cd" and not reader.ended
    reader.eof()
    assert reader.ended and not reader.reusable


def test_an_empty_body_and_an_interim_answer() -> None:
    reader = ResponseReader()
    reader.feed(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No\r\nConnection: close\r\n\r\n")
    assert (reader.status, reader.ended, reader.reusable) == (204, True, False)


@pytest.mark.parametrize(
    "wrong",
    [b"SSH-2.0\r\n", b"HTTP/1.1 x\r\n", CHUNKED.replace(b"5\r\n", b"zz\r\n"), b"x" * 70_000],
)
def test_what_is_no_http(wrong: bytes) -> None:
    with pytest.raises(ProtocolError):
        ResponseReader().feed(wrong)


@pytest.mark.parametrize("cut", [10, 40, len(CHUNKED) - 3])
def test_a_response_that_is_cut(cut: int) -> None:
    reader = ResponseReader()
    reader.feed(CHUNKED[:cut])
    with pytest.raises(ProtocolError, match="in the middle"):
        reader.eof()


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_events(size: int) -> None:
    stream = (
        b": hi\r\n\r\ndata: one\r\n\r\nevent: x\ndata:two\ndata: \xc3\xa9\n\nid: 3\n\ndata: cut"
    )
    reader = EventReader()
    pieces = [stream[place : place + size] for place in range(0, len(stream), size)]
    events = [event for piece in pieces for event in reader.feed(piece)]
    assert events == ["one", "two\né"]


@pytest.mark.parametrize(
    ("choice", "token"),
    [
        ({"text": "a"}, True),
        ({"text": "", "finish_reason": None}, True),  # half a character
        ({"text": "", "finish_reason": "length"}, False),
        ({"text": "b", "finish_reason": "length"}, True),
        ({"delta": {"role": "assistant", "content": ""}}, False),
        ({"delta": {"role": "assistant", "content": "a"}}, True),
        ({"delta": {"content": ""}}, True),
        ({"delta": {"reasoning_content": "hm", "content": None}}, True),
        ({"delta": {}, "finish_reason": "stop"}, False),
        ({"delta": {}}, False),
    ],
)
def test_which_events_bring_a_token(choice: dict[str, object], token: bool) -> None:
    assert has_token(choice) is token


def test_refusals_have_codes() -> None:
    codes = {status: refusal(status, "why").code for status in (400, 404, 429, 503, 500)}
    assert codes == {
        **{400: "invalid_request", 404: "bad_model", 429: "overloaded"},
        **{503: "overloaded", 500: "internal"},
    }
    assert "HTTP 400: why not" in str(refusal(400, "why\n  not"))


def test_urls() -> None:
    assert parse_url("http://localhost:8000/v1/") == ("localhost", 8000, False, "")
    assert parse_url("https://a.example/x/v1") == ("a.example", 443, True, "/x")
    assert parse_url("127.0.0.1:80").authority == "127.0.0.1:80"
    assert parse_url("http://[::1]:8000").authority == "[::1]:8000"
    for wrong in ("ftp://x", "http://", "http://a:x"):
        with pytest.raises(ConfigError):
            parse_url(wrong)
