"""A server of the socket protocol in the test's own event loop, with a script for what it answers.

It records what clients send. A script is `async (peer, submit) -> None` and is run as a task for
every Submit; the default one answers with `tokens_for` and an End.
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nodeserve.types import Timings
from nodeserve.wire.frames import FrameReader, frame
from nodeserve.wire.messages import (
    PROTOCOL_VERSION,
    TO_CLIENT,
    TO_SERVER,
    Abort,
    Audit,
    End,
    Experts,
    GetAudit,
    GetExperts,
    GetHealth,
    GetStats,
    Goodbye,
    Health,
    Hello,
    Stats,
    Stop,
    Submit,
    ToClient,
    Tokens,
    ToServer,
    pack_ids,
    unpack_ids,
)

VOCAB_SIZE = 264
TIMINGS = Timings(scheduler_wait_s=0.25, prefill_s=0.5, prefill_worker=0, decode_worker=1)


def tokens_for(submit: Submit) -> list[int]:
    """Three tokens that depend on the whole prompt."""
    total = sum(unpack_ids(submit.token_ids))
    return [(total + place) % VOCAB_SIZE for place in range(3)]


class Peer:
    """One connection."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    def send(self, message: ToClient) -> None:
        self._writer.write(frame(TO_CLIENT.encode(message)))

    def send_raw(self, data: bytes) -> None:
        self._writer.write(data)

    def tokens(
        self, request_id: int, ids: Sequence[int], logprobs: list[Any] | None = None
    ) -> None:
        self.send(Tokens([[request_id, pack_ids(ids), logprobs]]))

    def end(
        self, submit: Submit, reason: str, num_tokens: int, code: str | None = None, text: str = ""
    ) -> None:
        usage = {
            "prompt_tokens": len(submit.token_ids) // 4,
            "completion_tokens": num_tokens,
        }
        self.send(End(submit.request_id, reason, code, text, usage, asdict(TIMINGS), None))

    def close(self) -> None:
        self._writer.close()


Script = Callable[[Peer, Submit], Awaitable[None]]


async def answer(peer: Peer, submit: Submit) -> None:
    ids = tokens_for(submit)
    for token_id in ids:
        peer.tokens(submit.request_id, [token_id])
    peer.end(submit, "length", len(ids))


async def endless(peer: Peer, submit: Submit) -> None:
    """One token, and a request that goes on until it is aborted."""
    peer.tokens(submit.request_id, [ord("a")])


def saying(text: str) -> Script:
    """Answers every request with `text`, one byte a token (the fake byte-level vocabulary)."""

    async def script(peer: Peer, submit: Submit) -> None:
        for token_id in text.encode():
            peer.tokens(submit.request_id, [token_id])
        peer.end(submit, "stop", len(text.encode()))

    return script


class FakeServer:
    """`async with FakeServer(path) as server`."""

    def __init__(
        self,
        path: Path,
        script: Script = answer,
        *,
        welcome: ToClient | None = None,
        tokenizer: str = "/nowhere",
        max_frame_bytes: int = 1 << 20,
    ) -> None:
        self.path = path
        self.script = script
        self.about = {
            **{"model": "fake", "layout": "1p1d", "pid": 4_000_000, "version": "0"},
            **{"tokenizer": tokenizer, "vocab_size": VOCAB_SIZE, "eos_token_ids": [262]},
            **{"max_model_len": 512, "block_size": 16, "max_frame_bytes": max_frame_bytes},
        }
        self.welcome = welcome or Hello(PROTOCOL_VERSION, self.about)
        self.leaves_socket = False
        self.drains_for_ever = False
        self.is_stuck = False  # then it answers questions about its health only when it is not
        self._unanswered = 0
        self.stats: dict[str, Any] = {"model": "fake", "layout": "1p1d"}
        self.health: dict[str, Any] = {"state": "ready", "ready": True, "reasons": []}
        self.audit: dict[str, Any] = {"problems": [], "requests": {}, "workers": []}
        self.experts: dict[str, Any] = {"model": {}, "ranks": [], "silent": []}
        self.received: list[ToServer] = []
        self.peers: list[Peer] = []
        self.aborted: dict[int, asyncio.Event] = defaultdict(asyncio.Event)
        self._news = asyncio.Condition()
        self._tasks: set[asyncio.Future[None]] = set()

    async def __aenter__(self) -> "FakeServer":
        self._server = await asyncio.start_unix_server(self._serve, str(self.path))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        for peer in self.peers:
            peer.close()
        await self._server.wait_closed()

    @property
    def submits(self) -> list[Submit]:
        return [message for message in self.received if isinstance(message, Submit)]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until what was received makes `condition` true."""
        async with self._news:
            await self._news.wait_for(condition)

    async def until_received(self, kind: type, count: int = 1) -> None:
        await self.until(lambda: self.count(kind) >= count)

    def count(self, kind: type) -> int:
        return sum(isinstance(message, kind) for message in self.received)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(writer)
        self.peers.append(peer)
        frames = FrameReader(1 << 20)
        with contextlib.suppress(ConnectionError):
            peer.send(self.welcome)
            while data := await reader.read(1 << 16):
                for payload in frames.feed(data):
                    await self._on_message(peer, TO_SERVER.decode(payload))
        writer.close()

    async def _run(self, peer: Peer, submit: Submit) -> None:
        try:
            await self.script(peer, submit)
        except Exception:
            peer.close()  # so that a test with a wrong script fails instead of waiting
            raise

    async def _on_message(self, peer: Peer, message: ToServer) -> None:
        match message:
            case Submit():
                task = asyncio.ensure_future(self._run(peer, message))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case Abort():
                self.aborted[message.request_id].set()
            case GetStats():
                peer.send(Stats(self.stats))
            case GetHealth():
                self._unanswered += 1
                while self._unanswered and not self.is_stuck:
                    self._unanswered -= 1
                    peer.send(Health(self.health))
            case GetAudit():
                peer.send(Audit(self.audit))
            case GetExperts():
                peer.send(Experts(self.experts))
            case Stop(drain) if not (drain and self.drains_for_ever):
                if not self.leaves_socket:
                    self.path.unlink()
                peer.send(Goodbye("shutting_down", "the server was stopped"))
                peer.close()
        async with self._news:
            self.received.append(message)
            self._news.notify_all()
