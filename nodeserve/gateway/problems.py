"""Errors as OpenAI's clients expect them: {"error": {message, type, param, code}} and a status."""

import json
import math
import re

from starlette.responses import Response

from nodeserve.errors import InvalidRequest, NodeServeError, Overloaded, ProtocolError
from nodeserve.types import SAMPLING_FIELDS

RETRY_AFTER_S = 1.0  # where the server gave no time
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_FIELDS = SAMPLING_FIELDS | {"messages", "prompt", "priority", "stop"}
_FIRST_WORD = re.compile(r"[\w.\[\]-]+")


class BadField(InvalidRequest):
    """A field of the request's body, or a header, that cannot be as it is."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param} {message}")
        self.param = param


class HttpProblem(NodeServeError):
    """What only HTTP knows: no such route, no key, a body that is too large."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.name = code
        self.param = param


def status_of(error: NodeServeError) -> int:
    if isinstance(error, HttpProblem):
        return error.status
    if type(error) is ProtocolError:
        return 502  # between the gateway and its server: no client's fault
    return error.http_status


def param_of(error: NodeServeError) -> str | None:
    """The field that an error is about: its messages begin with it."""
    if isinstance(error, BadField | HttpProblem):
        return error.param
    if not isinstance(error, InvalidRequest):
        return None
    first = _FIRST_WORD.match(str(error))
    root = re.split(r"[.\[]", first[0])[0] if first else None
    if root in _FIELDS:
        return first[0] if first else None
    return "prompt" if "prompt" in str(error) or "token id" in str(error) else None


def error_object(error: NodeServeError) -> dict[str, object]:
    """The body of an error response, and of an error in the middle of a stream."""
    status = status_of(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = error.name if isinstance(error, HttpProblem) else error.code
    return {"error": {"message": str(error), "type": kind, "param": param_of(error), "code": code}}


def headers_of(error: NodeServeError) -> dict[str, str]:
    """When to try again, for a client that came too early; how to show a key."""
    status = status_of(error)
    if status == 401:
        return {"www-authenticate": "Bearer"}
    if not isinstance(error, Overloaded) and error.retry_after_s is None:
        return {}
    after_s = RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
    # OpenAI's clients read the finer one first.
    return {
        "retry-after": str(max(1, math.ceil(after_s))),
        "retry-after-ms": f"{1e3 * after_s:.0f}",
    }


def error_response(error: NodeServeError) -> Response:
    return Response(
        json.dumps(error_object(error)),
        status_of(error),
        headers_of(error),
        media_type="application/json",
    )
