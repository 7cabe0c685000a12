"""The gateway as an ASGI application."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from nodeserve.client import AsyncClient
from nodeserve.errors import NodeServeError
from nodeserve.gateway.engine import Engine
from nodeserve.gateway.gate import REQUEST_ID, Gate
from nodeserve.gateway.meters import Meters
from nodeserve.gateway.problems import HttpProblem, error_response
from nodeserve.gateway.routes import Routes
from nodeserve.gateway.settings import GatewaySettings
from nodeserve.gateway.spans import Spans

HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


def make_app(settings: GatewaySettings, spans: Spans | None = None) -> ASGIApp:
    """Over a connection to the server that is made by the first request, and again when lost.
    `spans` are closed when it ends; None: there are none."""
    client = AsyncClient(settings.socket, connect_timeout_s=settings.connect_timeout_s)

    meters = Meters()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await client.aclose()
        if spans is not None:
            await asyncio.to_thread(spans.close)

    app = Starlette(
        routes=Routes(Engine(client, settings.tool_call_parser), settings, meters).all(),
        middleware=[
            Middleware(Gate, keys=settings.api_keys, responses=meters.responses, spans=spans),
            *cors(settings),
        ],
        exception_handlers={
            NodeServeError: on_error,
            HTTPException: on_http_exception,
            Exception: on_bug,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a redirected POST loses its body with many clients

    return app


def cors(settings: GatewaySettings) -> list[Middleware]:
    if not settings.cors_origins:
        return []
    middleware = Middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=[REQUEST_ID, "retry-after"],
    )
    return [middleware]


async def on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, NodeServeError)
    return error_response(error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """What the router itself refuses."""
    assert isinstance(error, HTTPException)
    words = f"{request.method} {request.url.path}: {error.detail}"
    response = error_response(
        HttpProblem(error.status_code, HTTP_CODES.get(error.status_code, "http"), words)
    )
    response.headers.update(error.headers or {})
    return response


async def on_bug(request: Request, error: Exception) -> Response:
    """Its traceback is in the log, and says nothing to strangers."""
    return error_response(NodeServeError("the gateway failed; its log says how"))
