"""One connection, frame by frame: it sees what the client library would hide.

Every request that was sent gets right tokens only and exactly one End, in this order and nothing
after it; whatever else comes is a fault in the ledger.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from bench.soak.answers import Answer
from bench.soak.ledger import Ledger
from nodeserve.errors import ERRORS, Cancelled, NodeServeError, Overloaded, WorkerLost
from nodeserve.plan.goodput import Slo
from nodeserve.types import sampling_to
from nodeserve.wire.frames import FrameReader, frame
from nodeserve.wire.messages import (
    TO_CLIENT,
    TO_SERVER,
    Abort,
    End,
    Goodbye,
    Hello,
    Submit,
    ToClient,
    Tokens,
    ToServer,
    pack_ids,
    unpack_ids,
)

MAX_FRAME_BYTES = 64 << 20
LIMITS = Slo(2.0, 0.2)  # what is counted as in time


@dataclass(slots=True)
class Ask:
    """A request and what its client does: abort it after so many tokens, if at all."""

    answer: Answer
    slo: dict[str, float] | None = None
    priority: int = 0
    abort_after: int | None = None
    ends_with: str | None = None  # the code of the error that it must end with
    sent_s: float = 0.0
    first_s: float = 0.0
    kills_before: int = 0
    aborted: bool = False


class Line(asyncio.Protocol):
    """`on_tokens` is called with the number of tokens that came on this line so far."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.open: dict[int, Ask] = {}
        self.idle = asyncio.Event()
        self.closed = asyncio.Event()
        self.server: dict[str, object] = {}
        self.welcomed = asyncio.Event()
        self.on_tokens: Callable[[int], None] = lambda num_tokens: None
        self._num_tokens = 0
        self._ended: set[int] = set()
        self._next_id = 0
        self._leaving = False
        self._reader = FrameReader(MAX_FRAME_BYTES)
        self.idle.set()

    # ---- what a client does

    def send(self, ask: Ask) -> None:
        request_id, self._next_id = self._next_id, self._next_id + 1
        ask.sent_s, ask.kills_before = time.perf_counter(), self.ledger.num_kills
        self.open[request_id] = ask
        self.idle.clear()
        self.ledger.num_open += 1
        prompt, sampling = pack_ids(ask.answer.prompt), sampling_to(ask.answer.sampling)
        self._write(Submit(request_id, prompt, sampling, ask.slo, ask.priority))

    def hang_up(self) -> None:
        """Without a word, in the middle of everything."""
        self._leave()
        self.transport.abort()

    def pause(self) -> None:
        self.transport.pause_reading()

    def resume(self) -> None:
        self.transport.resume_reading()

    def _write(self, message: ToServer) -> None:
        self.transport.write(frame(TO_SERVER.encode(message)))

    def _leave(self) -> None:
        self._leaving = True
        self.ledger.num_open -= len(self.open)
        self.ledger.counts["left"] += len(self.open)
        self.open.clear()
        self.idle.set()

    # ---- what comes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._leaving:
            if self.open:
                self.ledger.fault(f"the connection was lost with {len(self.open)} open requests")
            self._leave()
        self.closed.set()

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._reader.feed(data):
                if self._leaving:  # since the message before it
                    return
                self._on_message(TO_CLIENT.decode(payload))
        except NodeServeError as error:
            self.ledger.fault(f"no message among {data[:64]!r}: {error}")
            self.hang_up()

    def _on_message(self, message: ToClient) -> None:
        match message:
            case Hello():
                self.server = message.server
                self.welcomed.set()
            case Tokens():
                for request_id, token_ids, _ in message.items:
                    self._on_tokens(request_id, unpack_ids(token_ids))
                self.on_tokens(self._num_tokens)
            case End():
                self._on_end(message)
            case Goodbye():
                if self.open:
                    self.ledger.fault(f"goodbye with open requests: {message.message}")
                self._leave()

    def _on_tokens(self, request_id: int, token_ids: Sequence[int]) -> None:
        ask = self.open.get(request_id)
        if ask is None:
            when = "after its end" if request_id in self._ended else "that was never sent"
            self.ledger.fault(f"tokens for a request {when}")
            return
        if not ask.answer.num_tokens:
            ask.first_s = time.perf_counter()
        self._num_tokens += len(token_ids)
        self.ledger.now.tokens += len(token_ids)
        if wrong := ask.answer.add(token_ids):
            self.ledger.fault(wrong)
        if ask.abort_after is not None and ask.answer.num_tokens >= ask.abort_after:
            self._abort(request_id, ask)

    def _abort(self, request_id: int, ask: Ask) -> None:
        if not ask.aborted:
            ask.aborted = True
            self._write(Abort(request_id))

    def abort_now(self) -> None:
        """Everything that is open and to be aborted before any token."""
        for request_id, ask in self.open.items():
            if ask.abort_after == 0:
                self._abort(request_id, ask)

    def _on_end(self, end: End) -> None:
        ask = self.open.pop(end.request_id, None)
        if ask is None:
            again = "a second end" if end.request_id in self._ended else "an end of none that runs"
            self.ledger.fault(f"{again}: {end.reason} {end.code}")
            return
        self._ended.add(end.request_id)
        self.ledger.num_open -= 1
        if not self.open:
            self.idle.set()
        if wrong := self._judge(ask, end):
            self.ledger.fault(wrong)

    def _judge(self, ask: Ask, end: End) -> str:
        """Counts an end; says what is wrong with it."""
        counts, now = self.ledger.counts, self.ledger.now
        counts[f"ended: {end.code or end.reason}"] += 1
        if ask.ends_with is not None:
            return "" if end.code == ask.ends_with else f"{end.code}, not {ask.ends_with}"
        if end.code is None:
            now.ended += 1
            now.in_time += self._in_time(ask)
            return ask.answer.end(end.reason)
        if end.code == Overloaded.code:
            now.refused += 1
            if not end.retry_after_s or ask.answer.num_tokens:
                return "refused without a time to try again, or after tokens"
            return ""
        if end.code == Cancelled.code and ask.aborted:
            return ""
        if end.code == WorkerLost.code and self.ledger.may_be_lost(ask.kills_before):
            return ""
        known = "" if end.code in ERRORS else ", which is no code"
        return f"ended with {end.code}{known}: {end.message}"

    @staticmethod
    def _in_time(ask: Ask) -> bool:
        gaps = ask.answer.num_tokens - 1
        now_s = time.perf_counter()
        tpot_s = (now_s - ask.first_s) / gaps if gaps else None
        return LIMITS.met(ask.first_s - ask.sent_s, tpot_s)


async def connect(path: str, ledger: Ledger) -> Line:
    """A line whose Hello has come."""
    loop = asyncio.get_running_loop()
    _, line = await loop.create_unix_connection(lambda: Line(ledger), path)
    await line.welcomed.wait()
    return line
