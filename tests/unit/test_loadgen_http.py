"""Event streams in whatever pieces they come, and what a server's answers mean."""

import sys

import pytest

from nodeserve.errors import ConfigError, ProtocolError
from nodeserve.gateway.asked import SLO_HEADERS
from nodeserve.loadgen.events import MAX_EVENT_BYTES, EventReader
from nodeserve.loadgen.http_client import parse_url
from nodeserve.loadgen.limits import parse_limits
from nodeserve.loadgen.openai_target import has_token, refusal, slo_headers
from nodeserve.loadgen.process import target_of
from nodeserve.loadgen.targets import TargetOptions


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_events(size: int) -> None:
    stream = (
        b": hi\r\n\r\ndata: one\r\n\r\nevent: x\ndata:two\ndata: \xc3\xa9\n\nid: 3\n\ndata: cut"
    )
    reader = EventReader()
    pieces = [stream[place : place + size] for place in range(0, len(stream), size)]
    events = [event for piece in pieces for event in reader.feed(piece)]
    assert events == ["one", "two\né"]


def test_an_event_that_never_ends() -> None:
    reader = EventReader()
    assert reader.feed(b"data: " + b"x" * (MAX_EVENT_BYTES - 6)) == []
    with pytest.raises(ProtocolError, match="too long"):
        reader.feed(b"x")


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


def test_limits_are_told_in_headers_that_the_gateway_knows() -> None:
    slo_ms = parse_limits(["ttft:500", "tpot:12.5"]).of_request()
    headers = slo_headers(slo_ms)
    assert headers == {"x-slo-ttft-ms": "500", "x-slo-tpot-ms": "12.5"}
    assert {SLO_HEADERS[name]: float(value) for name, value in headers.items()} == slo_ms


def test_refusals_have_codes() -> None:
    codes = {status: refusal(status, "why").code for status in (400, 404, 429, 503, 500)}
    assert codes == {
        **{400: "invalid_request", 404: "bad_model", 429: "overloaded"},
        **{503: "overloaded", 500: "internal"},
    }
    assert "HTTP 400: why not" in str(refusal(400, "why\n  not"))


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://localhost:8000/v1/", "http://localhost:8000"),
        ("https://a.example/x/v1?y=1#z", "https://a.example/x"),
        ("https://me:secret@a.example/x/", "https://a.example/x"),
        ("127.0.0.1:80", "http://127.0.0.1:80"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_urls(url: str, found: str) -> None:
    base = parse_url(url)
    assert base == parse_url(found)
    assert str(base.joinpath("v1/models")) == f"{found}/v1/models".replace(":80/", "/")


@pytest.mark.parametrize("wrong", ["ftp://x", "http://", "http://a:x", "/v1"])
def test_what_is_no_url(wrong: str) -> None:
    with pytest.raises(ConfigError, match="use http://HOST:PORT"):
        parse_url(wrong)


def test_a_url_needs_aiohttp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(ConfigError, match=r"pip install 'nodeserve\[bench\]'"):
        target_of(TargetOptions(url="http://127.0.0.1:1"))
