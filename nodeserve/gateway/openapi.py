"""/openapi.json: every route, what it takes and what it may answer.

Bodies are described by the tables that check them (tables.py), errors by the statuses of the typed
errors, so there is no second copy to keep true. Tests drive a real gateway by this document.
"""

from dataclasses import dataclass, field
from typing import Any

from nodeserve import __version__
from nodeserve.gateway.answer_schemas import SCHEMAS, named
from nodeserve.gateway.asked import NOT_IN_CHATS, NOT_IN_COMPLETIONS, SLO_HEADERS
from nodeserve.gateway.kinds import Only, Schema, object_schema
from nodeserve.gateway.response_asked import NOT_IN_RESPONSES
from nodeserve.gateway.tables import (
    CHAT,
    COMPLETION,
    DETOKENIZE,
    RESPONSE,
    TOKENIZE,
    Refused,
    Table,
)

JSON = "application/json"
EVENTS = "text/event-stream"
PAGE_TYPE = "text/html; charset=utf-8"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SERVER = (403, 500, 502, 503)  # of what asks it
TEXTS = (400, 404, 408, 413, *SERVER)
HEADERS = {"x-request-id": {"schema": {"type": "string"}, "required": True}}
ANSWERS = (*TEXTS, 429)
WORDS = {
    400: "A field cannot be as it is; `param` names it.",
    401: "No valid API key.",
    403: "The server does not let this gateway in.",
    404: "No such model.",
    408: "The body did not arrive in time.",
    413: "The body or the prompt is too large.",
    429: "Too much waits, or the first token would come too late.",
    500: "The server failed.",
    502: "A worker was lost and nobody could go on, or the server does not speak our protocol.",
    503: "No server, or one that cannot serve now.",
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One path and method. `answers` and `events` are names of SCHEMAS."""

    path: str
    name: str
    summary: str
    answers: str | None = None  # None: any JSON, or text of `media`
    statuses: tuple[int, ...] = ()  # of errors
    body: Table | None = None
    required: tuple[str, ...] = ()
    refused: Refused = field(default_factory=dict)
    events: str | None = None  # what comes for stream: true
    media: str = JSON
    open: bool = False  # needs no key

    @property
    def method(self) -> str:
        return "get" if self.body is None else "post"


OPERATIONS = (
    Operation(
        path="/v1/completions",
        name="completions",
        summary="Complete prompts",
        body=COMPLETION,
        required=("prompt",),
        refused=NOT_IN_COMPLETIONS,
        answers="Completion",
        events="CompletionEvent",
        statuses=ANSWERS,
    ),
    Operation(
        path="/v1/chat/completions",
        name="chat",
        summary="Answer a conversation, through the model's chat template",
        body=CHAT,
        required=("messages",),
        refused=NOT_IN_CHATS,
        answers="ChatCompletion",
        events="ChatCompletionEvent",
        statuses=ANSWERS,
    ),
    Operation(
        path="/v1/responses",
        name="responses",
        summary="Answer a text or messages, in the form of OpenAI's responses",
        body=RESPONSE,
        required=("input",),
        refused=NOT_IN_RESPONSES,
        answers="Response",
        events="ResponseEvent",
        statuses=ANSWERS,
    ),
    Operation("/v1/models", "models", "The served model", "Models", SERVER),
    Operation("/v1/models/{name}", "model", "One model", "Model", (404, *SERVER)),
    Operation(
        path="/tokenize",
        name="tokenize",
        summary="Token ids of a prompt, or of messages",
        body=TOKENIZE,
        answers="Tokenized",
        statuses=TEXTS,
    ),
    Operation(
        path="/detokenize",
        name="detokenize",
        summary="The text of token ids",
        body=DETOKENIZE,
        required=("tokens",),
        answers="Detokenized",
        statuses=TEXTS,
    ),
    Operation("/metrics", "metrics", "For Prometheus", statuses=SERVER, media=METRICS_TYPE),
    Operation("/version", "version", "The release", "Version"),
    Operation("/", "page", "What the node does, for a browser", media=PAGE_TYPE, open=True),
    Operation("/nodeserve/view", "view", "What the page draws", statuses=SERVER),
    Operation("/openapi.json", "openapi", "This document"),
    Operation("/live", "live", "Whether this process turns", "Live", open=True),
    Operation("/ready", "ready", "Whether a request would be served", "Ready", (503,), open=True),
    Operation("/health", "health", "The same as /ready", "Ready", (503,), open=True),
)


def document(has_keys: bool) -> dict[str, Any]:
    """OpenAPI 3.1. With keys, routes that need one say so."""
    components: dict[str, Any] = {"schemas": SCHEMAS}
    if has_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "nodeserve", "version": __version__},
        "paths": {one.path: {one.method: described(one, has_keys)} for one in OPERATIONS},
        "components": components,
    }


def described(one: Operation, has_keys: bool) -> dict[str, Any]:
    """An operation as OpenAPI has it."""
    keyed = has_keys and not one.open
    statuses = sorted({*one.statuses, 401} if keyed else one.statuses)
    found: dict[str, Any] = {
        "operationId": one.name,
        "summary": one.summary,
        "parameters": parameters(one),
        "responses": {"200": done(one), **{str(status): failed(status) for status in statuses}},
    }
    if one.body is not None:
        content = {JSON: {"schema": body_schema(one)}}
        found["requestBody"] = {"required": True, "content": content}
    if keyed:
        found["security"] = [{"key": []}]
    return found


def body_schema(one: Operation) -> Schema:
    """What a body may be. Fields that are not named here are ignored."""
    assert one.body is not None
    refused = {name: Only(values) for name, values in one.refused.items()}
    return object_schema({**refused, **one.body}, one.required)


def parameters(one: Operation) -> list[dict[str, Any]]:
    found = []
    if "{name}" in one.path:
        name = {"type": "string", "minLength": 1}
        found.append({"name": "name", "in": "path", "required": True, "schema": name})
    if one.events is not None:
        limit = {"type": "number", "exclusiveMinimum": 0}
        found += [{"name": name, "in": "header", "schema": limit} for name in SLO_HEADERS]
    return found


def done(one: Operation) -> dict[str, Any]:
    """What comes with status 200."""
    if one.media != JSON:
        content: dict[str, Any] = {one.media: {"schema": {"type": "string"}}}
    else:
        content = {JSON: {"schema": named(one.answers) if one.answers else {"type": "object"}}}
    words = "The answer."
    if one.events is not None:
        content[EVENTS] = {}  # OpenAPI 3.1 has no words for the events of a stream
        words += f" As a stream: server-sent events, the data of each is a {one.events}."
    return {"description": words, "headers": HEADERS, "content": content}


def failed(status: int) -> dict[str, Any]:
    content = {JSON: {"schema": named("Error")}}
    return {"description": WORDS[status], "headers": HEADERS, "content": content}
