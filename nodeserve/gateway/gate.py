"""What every request passes before its route: an id, a key, a body of bearable size."""

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence

from prometheus_client import Counter
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nodeserve.gateway.problems import HttpProblem, error_response
from nodeserve.gateway.spans import SPAN, RequestSpan, Spans
from nodeserve.log import about, logger

# Orchestrators ask these and have no key; the page has nothing secret and asks its reader for one.
OPEN_PATHS = frozenset({"/", "/health", "/live", "/ready"})
PATHS = OPEN_PATHS | {
    *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/models"),
    *("/tokenize", "/detokenize", "/metrics", "/version", "/openapi.json", "/nodeserve/view"),
}
MODELS = "/v1/models/"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})
REQUEST_ID = "x-request-id"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Keys:
    """Compares in constant time: how long it takes says nothing about a key, nor about which."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def check(self, authorization: str | None) -> None:
        """HttpProblem 401 unless the header shows a key that counts, or none is needed."""
        if not self._digests:
            return
        scheme, _, shown = (authorization or "").partition(" ")
        digest = _digest(shown.strip().encode("latin-1"))  # the header's own bytes
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            words = "no valid API key: send the header Authorization: Bearer KEY"
            raise HttpProblem(401, "invalid_api_key", words)


def _digest(key: bytes) -> bytes:
    """Keys of different lengths compare alike."""
    return hashlib.sha256(key).digest()


class Gate:
    """Wraps the routes. Each response gets the request's id, its own or the client's."""

    def __init__(
        self, app: ASGIApp, keys: Sequence[str], responses: Counter, spans: Spans | None = None
    ) -> None:
        self._app = app
        self._spans = spans
        self._responses = responses
        self._keys = Keys(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = request_id_of(headers)
        scope["nodeserve.request_id"] = request_id
        visit = Visit(scope["method"], route_of(scope["path"]), request_id)
        if self._spans is not None:
            visit.span = self._spans.begin(visit.method, visit.route, request_id, headers)
        scope[SPAN] = visit.span

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.answered(message["status"])
                self._responses.labels(visit.route, str(message["status"])).inc()
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            await self._let_in(scope, headers, receive, send_with_id)
        finally:
            visit.ended()

    async def _let_in(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        try:
            # A browser asks without its headers whether it may send them.
            if scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
                self._keys.check(headers.get("authorization"))
        except HttpProblem as problem:
            await error_response(problem)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class Visit:
    """One request, for the log and for spans. Without a response its status is 500: a bug's."""

    def __init__(self, method: str, route: str, request_id: str) -> None:
        self.method = method if method in METHODS else "other"
        self.route = route
        self.request_id = request_id
        self.span: RequestSpan | None = None
        self._status = 500
        self._began_s = time.perf_counter()

    def answered(self, status: int) -> None:
        self._status = status

    def ended(self) -> None:
        if self.span is not None:
            self.span.status(self._status)
            self.span.end()
        if logger.isEnabledFor(logging.DEBUG):
            facts = {
                **{"method": self.method, "route": self.route, "status": self._status},
                **{"ms": round(1e3 * (time.perf_counter() - self._began_s), 3)},
                "request_id": self.request_id,
            }
            words = "%s %s: %d after %.1f ms, request %s"
            logger.debug(words, *facts.values(), extra=about("http_request", **facts))


def route_of(path: str) -> str:
    """The path of a known route, so that strangers cannot invent any number of labels."""
    return path if path in PATHS else MODELS if path.startswith(MODELS) else "other"


def request_id_of(headers: Headers) -> str:
    """The client's, if it is one that can be repeated; else a new one."""
    given = headers.get(REQUEST_ID, "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
