"""The node's state as the page draws it.

The server is asked when somebody looks, once a second at most, however many look at a time: whoever
comes meanwhile gets the same answer.
"""

import asyncio
import json
import math
import time
from collections.abc import Callable
from typing import Any

from nodeserve.gateway.engine import CHECK_TIMEOUT_S, Engine
from nodeserve.gateway.problems import HttpProblem
from nodeserve.views import History, to_json

FRESH_S = 0.9  # pages ask every second


class View:
    """One gateway process's."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._history = History()
        self._body = b""
        self._made_s = -math.inf
        self._asking: asyncio.Task[bytes] | None = None

    async def body(self) -> bytes:
        """JSON (docs/gateway.md); NodeServeError when the server does not answer."""
        if self._clock() - self._made_s < FRESH_S:
            return self._body
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask(), name="view")
            self._asking.add_done_callback(self._asked)
        return await asyncio.shield(self._asking)  # one who leaves takes nothing from the others

    async def _ask(self) -> bytes:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                stats = await self._engine.client.stats()
        except TimeoutError:
            words = f"the server has not answered for {CHECK_TIMEOUT_S:g} s"
            raise HttpProblem(503, "not_ready", words) from None
        view = finite(to_json(self._history.add(stats)))
        self._body = json.dumps(view, separators=(",", ":"), allow_nan=False).encode()
        self._made_s = self._clock()
        return self._body

    def _asked(self, task: "asyncio.Task[bytes]") -> None:
        self._asking = None
        if not task.cancelled():
            task.exception()  # seen, also where everybody who waited for it has left


def finite(value: Any) -> Any:
    """The same with None for what JSON has no number for, as an SLO that a client left open."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
