"""The routes: what each path does."""

import json
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from nodeserve import __version__
from nodeserve.errors import NodeServeError
from nodeserve.gateway.answers import Answers
from nodeserve.gateway.asked import Asked, chat_of, completion_of
from nodeserve.gateway.body import read_object
from nodeserve.gateway.engine import Engine
from nodeserve.gateway.fields import Fields
from nodeserve.gateway.meters import Meters
from nodeserve.gateway.node_metrics import node_text
from nodeserve.gateway.openapi import METRICS_TYPE, PAGE_TYPE, document
from nodeserve.gateway.page import load_page
from nodeserve.gateway.problems import HttpProblem
from nodeserve.gateway.response_asked import response_of
from nodeserve.gateway.responses import ResponseShape
from nodeserve.gateway.settings import GatewaySettings
from nodeserve.gateway.shapes import ChatShape, CompletionShape, Shape
from nodeserve.gateway.tables import DETOKENIZE, TOKENIZE
from nodeserve.gateway.texts import detokenized, tokenized
from nodeserve.gateway.tool_shape import ToolShape
from nodeserve.gateway.view import View


class Routes:
    """Endpoints over one engine."""

    def __init__(self, engine: Engine, settings: GatewaySettings, meters: Meters) -> None:
        self._engine = engine
        self._meters = meters
        self._settings = settings
        self._page = load_page()
        self._view = View(engine)

    def all(self) -> list[BaseRoute]:
        return [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/responses", self.responses, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/metrics", self.metrics),
            Route("/version", self.version),
            Route("/openapi.json", self.openapi),
            Route("/live", self.live),
            Route("/ready", self.ready),
            Route("/health", self.ready),
            Route("/", self.page),
            Route("/nodeserve/view", self.view),
        ]

    # ---- answers

    async def completions(self, request: Request) -> Response:
        body = await read_object(request, self._settings)
        return await self._answers(request, CompletionShape, completion_of(body, request.headers))

    async def chat(self, request: Request) -> Response:
        asked = chat_of(await read_object(request, self._settings), request.headers)
        shape = ChatShape if asked.tooling is None else ToolShape
        return await self._answers(request, shape, asked)

    async def responses(self, request: Request) -> Response:
        body = await read_object(request, self._settings)
        return await self._answers(request, ResponseShape, response_of(body, request.headers))

    async def _answers(self, request: Request, shape: type[Shape], asked: Asked) -> Response:
        model = await self._engine.check_model(asked.model)
        request_id = request.scope["nodeserve.request_id"]
        return Answers(
            self._engine, shape(asked, request_id, model, int(time.time())), self._meters
        )

    # ---- the model

    async def models(self, request: Request) -> Response:
        return answer({"object": "list", "data": [await self._model_card()]})

    async def model(self, request: Request) -> Response:
        await self._engine.check_model(request.path_params["name"])
        return answer(await self._model_card())

    async def _model_card(self) -> dict[str, Any]:
        about = await self._engine.about()
        return {
            "id": about["model"],
            "object": "model",
            "created": self._engine.created_s,
            "owned_by": "nodeserve",
            "root": about["model"],
            "parent": None,
            "max_model_len": about["max_model_len"],
        }

    # ---- text

    async def tokenize(self, request: Request) -> Response:
        fields = Fields(await read_object(request, self._settings), TOKENIZE)
        await self._engine.check_model(fields.read("model"))
        return answer(await tokenized(self._engine, fields))

    async def detokenize(self, request: Request) -> Response:
        fields = Fields(await read_object(request, self._settings), DETOKENIZE)
        await self._engine.check_model(fields.read("model"))
        return answer(await detokenized(self._engine, fields))

    # ---- how it is

    async def metrics(self, request: Request) -> Response:
        """Of this gateway, and of the node if the server answers."""
        stats = await self._engine.stats()
        about = None if stats is None else await self._engine.about()
        text = self._meters.text() + node_text(about, stats)
        return Response(text, media_type=METRICS_TYPE)

    async def version(self, request: Request) -> Response:
        return answer({"version": __version__})

    async def openapi(self, request: Request) -> Response:
        return answer(document(bool(self._settings.api_keys)))

    async def live(self, request: Request) -> Response:
        """This process turns; nothing is said about the server."""
        return answer({"status": "live"})

    async def ready(self, request: Request) -> Response:
        """A request would be taken, and somebody is there to compute it."""
        try:
            health = await self._engine.health()
        except NodeServeError as error:
            raise HttpProblem(503, error.code, str(error)) from None
        if not health.ready:
            words = "; ".join(health.reasons)
            raise HttpProblem(503, "not_ready", f"the server is {health.state}: {words}")
        return answer({"status": health.state, "reasons": list(health.reasons)})

    # ---- the page

    async def page(self, request: Request) -> Response:
        return Response(self._page.body, headers=self._page.headers, media_type=PAGE_TYPE)

    async def view(self, request: Request) -> Response:
        """What the page draws."""
        body = await self._view.body()
        headers = {"cache-control": "no-store"}
        return Response(body, headers=headers, media_type="application/json")


def answer(value: dict[str, Any]) -> Response:
    return Response(json.dumps(value), media_type="application/json")
