"""A gateway in the test's own event loop, and OpenAI's own client of it on a Unix socket."""

import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai

from nodeserve.gateway.listen import Address, listening
from nodeserve.gateway.serve import make_server
from nodeserve.gateway.settings import GatewaySettings
from nodeserve.gateway.spans import Spans

BASE_URL = "http://gateway"


@contextlib.asynccontextmanager
async def gateway_on(
    where: Path | Address, settings: GatewaySettings, spans: Spans | None = None
) -> AsyncIterator[Address]:
    """Yields its address, with the real port."""
    address = where if isinstance(where, Address) else Address(path=where)
    server = make_server(settings, spans)
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    with listening(address, 1) as (real, sockets):
        # Its serve() looks ten times a second whether it shall end, which is long for a test.
        await server.startup(sockets=sockets)
        try:
            yield real
        finally:
            await server.shutdown(sockets=sockets)


def http_client(path: Path, **options: Any) -> httpx2.AsyncClient:
    """Plain HTTP over the Unix socket."""
    transport = httpx2.AsyncHTTPTransport(uds=str(path), verify=False)  # quicker to make
    return httpx2.AsyncClient(transport=transport, base_url=BASE_URL, timeout=60.0, **options)


def sdk(path: Path, **options: Any) -> openai.AsyncOpenAI:
    """The real SDK over the Unix socket, without its retries."""
    settings = {"api_key": "none", "max_retries": 0, **options}
    return openai.AsyncOpenAI(base_url=f"{BASE_URL}/v1", http_client=http_client(path), **settings)


def events_of(body: bytes) -> Iterator[dict[str, Any]]:
    """Those of a stream, which must end as it should."""
    *events, done, rest = body.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    for event in events:
        assert event.startswith("data: ") and "\n" not in event
        yield json.loads(event.removeprefix("data: "))
