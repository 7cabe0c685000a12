"""The body of a request, read in bounded memory and time."""

import asyncio
from typing import Any

from starlette.requests import ClientDisconnect, Request

from nodeserve.errors import Cancelled
from nodeserve.gateway.fields import json_object
from nodeserve.gateway.problems import HttpProblem
from nodeserve.gateway.settings import GatewaySettings


async def read_object(request: Request, settings: GatewaySettings) -> dict[str, Any]:
    """The JSON object in it; HttpProblem 413 for one too large, 408 for one that does not end."""
    return json_object(await read_body(request, settings))


async def read_body(request: Request, settings: GatewaySettings) -> bytes:
    limit, parts, size = settings.max_body_bytes, [], 0
    if int(request.headers.get("content-length") or 0) > limit:  # the server checked the number
        raise too_large(limit)
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > limit:
                    raise too_large(limit)
    except TimeoutError:
        words = f"the body did not arrive in {settings.body_timeout_s:g} s"
        raise HttpProblem(408, "body_timeout", words) from None
    except ClientDisconnect:
        raise Cancelled("the client hung up") from None
    return b"".join(parts)


def too_large(limit: int) -> HttpProblem:
    return HttpProblem(413, "body_too_large", f"the body has more than {limit} bytes (--max-body)")
