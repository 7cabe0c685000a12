"""What goes back to one connection.

Always true: a connection gets at most one Tokens frame per flush, whatever number of its requests
moved (several of some MiB to one that reads again), and a request's End is written after all of its
tokens. While the peer does not read, tokens stay in their requests (they are there anyway); what
would pile up is kept as it will be written: Ends, and tokens with log probabilities. So a slow
reader stalls itself alone; past `max_backlog_bytes`, or what is left for all together if that is
less, its connection is closed and its requests are cancelled.
"""

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from operator import attrgetter
from typing import Any

from nodeserve.coordinator.request import Request
from nodeserve.errors import NodeServeError
from nodeserve.policy.metering import Meter
from nodeserve.types import Timings
from nodeserve.wire.frames import frame
from nodeserve.wire.messages import TO_CLIENT, End, Goodbye, ToClient, Tokens, pack_ids

FRAME_BYTES = 4 << 20  # of tokens that waited, in one frame and an item more
_TIMING_NAMES = tuple(field.name for field in fields(Timings))
_timing_values = attrgetter(*_TIMING_NAMES)


class Backlog:
    """What may be kept for peers that do not read, or of what they have not sent whole: together,
    and for one as much as is left beside what the others have. So a few can have all they need, and
    many cannot exhaust memory."""

    def __init__(self, max_bytes: int) -> None:
        self.left_bytes = max_bytes


class Stream:
    """The outgoing half of one client connection. `backlog` is shared with others; None: alone.
    `clock` is monotonic, as the coordinator's."""

    def __init__(
        self,
        transport: asyncio.WriteTransport,
        max_backlog_bytes: int,
        meter: Meter | None = None,
        backlog: Backlog | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.meter = meter  # None: its requests are not counted
        self.requests: dict[int, Request] = {}  # by the client's id, until their End is written
        self.closed = False
        self._transport = transport
        self._max_backlog_bytes = max_backlog_bytes
        self._backlog = backlog or Backlog(2 * max_backlog_bytes)
        self.paused = False  # the peer does not read
        self._clock = clock
        self._dirty: list[Request] = []
        self._dirty_logprobs: list[Request] = []  # those that have them, never across a flush
        self._ends: list[bytes] = []
        self._held_bytes = 0

    def send(self, message: ToClient) -> None:
        """Write one message now, or keep it in order while the peer does not read."""
        if self.closed:
            return
        data = frame(TO_CLIENT.encode(message))
        if self.paused:
            self._hold(data)
        else:
            self._transport.write(data)

    def mark(self, request: Request) -> None:
        """`request` has tokens to send at the next flush."""
        request.dirty = True
        (self._dirty_logprobs if request.wants_logprobs else self._dirty).append(request)

    def end(self, request: Request, end: End) -> None:
        """The terminal event of `request`, after the tokens that it has left."""
        if self.requests.get(request.client_id) is request:
            del self.requests[request.client_id]
        if self.closed:
            return
        if self.paused:
            self._hold_tail(request)
        else:
            self.flush()
        self.send(end)

    def flush(self) -> None:
        """One frame for everything new. While the peer does not read, one is kept for what has log
        probabilities."""
        if self.closed:
            return
        if self.paused:
            self._hold_tokens(self._dirty_logprobs)
        elif self._dirty or self._dirty_logprobs:
            items = [self._item(request) for request in (*self._dirty, *self._dirty_logprobs)]
            self._dirty.clear()
            self._transport.write(frame(TO_CLIENT.encode(Tokens(items))))
        self._dirty_logprobs.clear()

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False
        for data in self._let_go():
            self._transport.write(data)
        if self.closed:  # the last of them was its goodbye
            self._transport.close()
        else:
            now_s = self._clock()
            for request in self.requests.values():
                if request.awaits_reader:
                    request.stamps.told = now_s
            for part in self._parts():
                self._transport.write(frame(TO_CLIENT.encode(Tokens(part))))

    def _parts(self) -> Iterator[list[Any]]:
        """What waited in the requests: no frame may be larger than the protocol allows."""
        dirty, self._dirty = self._dirty, []
        part, num_bytes = [], 0
        for request in dirty:
            part.append(item := self._item(request))
            num_bytes += len(item[1])
            if num_bytes >= FRAME_BYTES:
                yield part
                part, num_bytes = [], 0
        if part:
            yield part

    def goodbye(self, code: str, message: str) -> None:
        """Last frame, then close; whatever is unsent before it is still delivered, also to a peer
        that begins to read only now."""
        if self.closed:
            return
        self.flush()
        self.send(Goodbye(code, message))
        if not self.paused:
            self._transport.close()
        self.closed = True

    def abort(self) -> None:
        self.closed = True
        self._transport.abort()

    def lost(self) -> None:
        """The connection is gone, and with it what was kept for it."""
        self.closed = True
        self._let_go()

    @staticmethod
    def _item(request: Request) -> list[Any]:
        tokens = pack_ids(request.tokens[request.num_sent :])
        request.num_sent = len(request.tokens)
        request.dirty = False
        logprobs: list[Any] | None = None
        if request.wants_logprobs:
            logprobs, request.logprobs = request.logprobs, []
        return [request.client_id, tokens, logprobs]

    def _hold_tail(self, request: Request) -> None:
        if request.dirty:
            (self._dirty_logprobs if request.wants_logprobs else self._dirty).remove(request)
            self._hold_tokens([request])

    def _hold_tokens(self, requests: list[Request]) -> None:
        if not requests:
            return
        for request in requests:
            if request.awaits_reader:
                request.stamps.told = math.inf
        items = [self._item(request) for request in requests]
        self._hold(frame(TO_CLIENT.encode(Tokens(items))))

    def _hold(self, data: bytes) -> None:
        self._ends.append(data)
        self._held_bytes += len(data)
        self._backlog.left_bytes -= len(data)
        if self._held_bytes > min(self._max_backlog_bytes, self._backlog.left_bytes):
            self.abort()

    def _let_go(self) -> list[bytes]:
        held, self._ends = self._ends, []
        self._backlog.left_bytes += self._held_bytes
        self._held_bytes = 0
        return held


def end_of(request: Request, reason: str, timings: Timings, code: str | None, message: str) -> End:
    """The End of a request that ran."""
    return End(request.client_id, reason, code, message, request.usage(), told(timings), None)


def refusal(client_id: int, error: NodeServeError) -> End:
    """The End of a request that never ran."""
    usage = {"prompt_tokens": 0, "completion_tokens": 0}
    timings = told(Timings())
    return End(client_id, "error", error.code, str(error), usage, timings, error.retry_after_s)


def told(timings: Timings) -> dict[str, Any]:
    """As it travels; a tenth of the time that `dataclasses.asdict` takes, once for each request."""
    return dict(zip(_TIMING_NAMES, _timing_values(timings), strict=True))
