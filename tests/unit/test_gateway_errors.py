"""What goes wrong at the gateway: status, shape, headers, and nothing left running behind it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from nodeserve.errors import ConfigError
from nodeserve.gateway.settings import GatewaySettings, read_keys
from nodeserve.wire.messages import Abort, End, Submit
from tests.fakes.gateway import gateway_on, http_client, sdk
from tests.fakes.server import FakeServer, Peer, endless, saying

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
NO_USAGE = {"prompt_tokens": 0, "completion_tokens": 0}


@contextlib.asynccontextmanager
async def fronted(server: FakeServer, **settings: Any) -> AsyncIterator[Path]:
    """The socket of a gateway in front of `server`."""
    path = server.path.parent / "http"
    async with gateway_on(path, GatewaySettings(socket=str(server.path), **settings)):
        yield path


@pytest.fixture
async def http(server: FakeServer) -> AsyncIterator[Path]:
    async with fronted(server) as path:
        yield path


def refusing(code: str, message: str, retry_after_s: float | None = None) -> Any:
    async def script(peer: Peer, submit: Submit) -> None:
        peer.send(End(submit.request_id, "error", code, message, NO_USAGE, {}, retry_after_s))

    return script


async def test_overload_says_when_to_come_back(server: FakeServer, http: Path) -> None:
    server.script = refusing("overloaded", "the SLO is 0.1 s", 2.34)
    for stream in (False, True):
        async with sdk(http) as client:
            with pytest.raises(openai.RateLimitError, match="the SLO is 0.1 s") as caught:
                await client.chat.completions.create(model="fake", messages=HELLO, stream=stream)
        response = caught.value.response
        assert response.status_code == 429
        assert response.headers["retry-after"] == "3"
        assert response.headers["retry-after-ms"] == "2340"
        assert caught.value.type == "rate_limit_error" and caught.value.code == "overloaded"


async def test_the_sdk_tries_again_by_itself(server: FakeServer, http: Path) -> None:
    refusals = [refusing("overloaded", "later", 0.001)] * 2

    async def script(peer: Peer, submit: Submit) -> None:
        await (refusals.pop() if refusals else saying("ok"))(peer, submit)

    server.script = script
    async with sdk(http, max_retries=2) as client:
        done = await client.completions.create(model="fake", prompt="x")
    assert done.choices[0].text == "ok" and server.count(Submit) == 3


CODES = [  # of the server; HTTP's status, OpenAI's type
    ("prompt_too_long", 400, "invalid_request_error"),
    ("invalid_request", 400, "invalid_request_error"),
    ("worker_lost", 502, "server_error"),
    ("out_of_blocks", 503, "server_error"),
    ("shutting_down", 503, "server_error"),
    ("internal", 500, "server_error"),
]


async def test_errors_of_the_server(server: FakeServer, http: Path) -> None:
    async with http_client(http) as client:
        for code, status, kind in CODES:
            server.script = refusing(code, "the prompt and so on")
            for body in ({"prompt": "x"}, {"prompt": "x", "stream": True}, {"prompt": "x", "n": 3}):
                response = await client.post("/v1/completions", json=body)
                error = response.json()["error"]
                assert response.status_code == status, code
                assert error["message"] == "the prompt and so on"
                assert (error["type"], error["code"]) == (kind, code)
                assert error["param"] == ("prompt" if status == 400 else None)


async def test_an_error_after_the_first_token_is_in_the_stream(
    server: FakeServer, http: Path
) -> None:
    async def script(peer: Peer, submit: Submit) -> None:
        await endless(peer, submit)
        await asyncio.sleep(0)
        peer.end(submit, "error", 1, "worker_lost", "worker 1 ended")

    server.script = script
    async with sdk(http) as client:
        seen = []
        with pytest.raises(openai.APIError, match="worker 1 ended"):
            async for event in await client.completions.create(
                model="fake", prompt="x", stream=True
            ):
                seen.append(event.choices[0].text)
    assert "".join(seen) == "a"


WRONG = [  # method, path, body; status, the field that is named
    ("POST", "/v1/completions", b"{", 400, None),
    ("POST", "/v1/completions", b"[]", 400, None),
    ("POST", "/v1/completions", b"{}", 400, "prompt"),
    ("POST", "/v1/completions", b'{"prompt": "x", "suffix": "y"}', 400, "suffix"),
    ("POST", "/v1/completions", b'{"prompt": "x", "temperature": -1}', 400, "temperature"),
    ("POST", "/v1/completions", b'{"prompt": "x", "model": "other"}', 404, "model"),
    ("POST", "/v1/completions", b'{"prompt": [4294967296]}', 400, "prompt"),
    ("POST", "/v1/completions", b'{"prompt": "\\ud800"}', 400, "prompt"),
    ("POST", "/v1/chat/completions", b'{"messages": [5]}', 400, "messages[0]"),
    ("POST", "/v1/chat/completions", b'{"messages": [{}], "tools": [{}]}', 400, "tools[0].type"),
    ("GET", "/v1/completions", b"", 405, None),
    ("GET", "/v1/nothing", b"", 404, None),
    ("POST", "/v1/completions/", b"{}", 404, None),
]


async def test_what_a_client_does_wrong(http: Path) -> None:
    async with http_client(http) as client:
        for method, path, body, status, param in WRONG:
            response = await client.request(method, path, content=body)
            error = response.json()["error"]
            assert response.status_code == status, (path, body)
            assert error["type"] == "invalid_request_error" and error["param"] == param, body
            assert error["message"] and error["code"]
            assert response.headers["x-request-id"]


async def test_one_that_fails_ends_the_others(server: FakeServer, http: Path) -> None:
    async def script(peer: Peer, submit: Submit) -> None:
        refuse = submit.sampling["seed"] == 12
        await (refusing("out_of_blocks", "no room") if refuse else endless)(peer, submit)

    server.script = script
    async with http_client(http) as client:
        body = {"prompt": "x", "n": 3, "seed": 10}
        assert (await client.post("/v1/completions", json=body)).status_code == 503
    await server.until_received(Abort, 2)


# ---- clients that leave


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_hangs_up_cancels_its_requests(
    server: FakeServer, http: Path, stream: bool, n: int
) -> None:
    server.script = endless
    body = {"prompt": "x", "stream": stream, "n": n}
    async with http_client(http) as client:
        asking = asyncio.ensure_future(client.post("/v1/completions", json=body))
        await server.until_received(Submit, n)
        assert server.count(Abort) == 0
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    await server.until_received(Abort, n)
    assert all(event.is_set() for event in server.aborted.values()) and len(server.aborted) == n


async def test_what_runs_when_the_gateway_stops_is_cut_off(server: FakeServer) -> None:
    server.script = endless
    async with http_client(server.path.parent / "http") as client:
        async with fronted(server, stop_timeout_s=0):
            asking = asyncio.ensure_future(client.post("/v1/completions", json={"prompt": "x"}))
            await server.until_received(Submit)
        with contextlib.suppress(Exception):
            await asking
    assert server.count(Submit) == 1


# ---- servers that are gone


async def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    settings = GatewaySettings(socket=str(tmp_path / "none"))
    async with gateway_on(tmp_path / "http", settings), http_client(tmp_path / "http") as client:
        assert (await client.get("/live")).status_code == 200
        for path in ("/ready", "/health", "/v1/models"):
            response = await client.get(path)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "connection_lost"
        async with FakeServer(tmp_path / "none"):
            assert (await client.get("/ready")).status_code == 200
        assert (await client.get("/ready")).status_code == 503


# ---- keys, sizes, browsers


async def test_keys(server: FakeServer) -> None:
    async with fronted(server, api_keys=("first", "zweiter-schlüssel")) as http:
        for key in ("first", "zweiter-schlüssel"):
            async with http_client(http) as client:
                header = {b"Authorization": f"Bearer {key}".encode()}
                assert (await client.get("/v1/models", headers=header)).status_code == 200
        async with sdk(http, api_key="firs") as wrong:
            with pytest.raises(openai.AuthenticationError) as caught:
                await wrong.completions.create(model="fake", prompt="x")
            assert caught.value.code == "invalid_api_key"
        async with http_client(http) as client:
            for scheme in ({}, {"Authorization": "Basic first"}, {"Authorization": "first"}):
                response = await client.get("/v1/models", headers=scheme)
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
            assert (await client.get("/nothing")).status_code == 401
            for path in ("/live", "/ready", "/health"):
                assert (await client.get(path)).status_code == 200
    assert not server.submits


def test_where_keys_come_from(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\n one \n\ntwo\n")
    assert read_keys(path, None) == ("one", "two")
    assert read_keys(path, "env") == ("env", "one", "two")
    assert read_keys(None, None) == read_keys(None, "") == ()
    path.write_text("# none yet\n")
    for wrong in (path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="--api-key-file"):
            read_keys(wrong, "env")


async def test_bodies_have_a_limit(server: FakeServer) -> None:
    async with fronted(server, max_body_bytes=1000) as http, http_client(http) as client:

        async def in_parts() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b"x" * 500

        for content in (b"x" * 1001, in_parts()):
            response = await client.post("/v1/completions", content=content)
            assert response.status_code == 413
            assert "1000 bytes" in response.json()["error"]["message"]
        fits = await client.post("/v1/completions", json={"prompt": "x" * 900})
        assert fits.status_code == 200


async def test_a_body_that_does_not_end_is_given_up(server: FakeServer) -> None:
    async with fronted(server, body_timeout_s=0.05) as http:
        reader, writer = await asyncio.open_unix_connection(str(http))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        assert b" 408 " in await reader.readline()
        writer.close()


async def test_pages_of_other_origins_may_ask_only_where_told(server: FakeServer) -> None:
    header = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    for origins, allowed in ((), None), (("https://a.example",), "https://a.example"):
        settings = {"cors_origins": origins, "api_keys": ("k",)}
        async with fronted(server, **settings) as http, http_client(http) as client:
            asked = await client.options("/v1/completions", headers=header)
            assert asked.headers.get("access-control-allow-origin") == allowed
