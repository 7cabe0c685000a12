"""A real server on the card, from its start to its end, and what a client of it sees and when.

In a rehearsal the server's workers run on the pretended runtime, and the coordinator is told that
there is a GPU; everything else is the same.
"""

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu.bed import Bed
from nodeserve.wire.messages import End, Tokens, unpack_ids
from tests.fakes.raw_client import RawClient

STOP_S = 30.0
REHEARSED_NODE = "bench.gpu.rehearsed_node"


@dataclass(frozen=True, slots=True)
class Node:
    """A server that is ready."""

    process: "subprocess.Popen[str]"
    socket: Path
    start_s: float  # from its process's start to ready


@contextlib.contextmanager
def served(bed: Bed, folder: Path, name: str, **settings: Any) -> Iterator[Node]:
    """`nodeserve start` with these settings; ended in the end, whatever happens."""
    socket = folder / f"{name}.sock"
    words = [str(settings.pop("model"))] if "model" in settings else []
    for key, value in {"socket": socket, "handoff": bed.handoff, **settings}.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    module = REHEARSED_NODE if bed.rehearsal else "nodeserve"
    began_s = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", module, "start", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    words_of = Words(process)
    try:
        words_of.until_ready()
        yield Node(process, socket, time.perf_counter() - began_s)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        process.kill()
        process.wait()
        words_of.thread.join()


class Words:
    """What a server says, read all the time so that it never waits for a reader."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._lines: list[str] = []
        self._ready = False
        self._news = threading.Event()  # ready, or at its end
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            print(line, end="", flush=True)
            self._lines.append(line)
            if " ready: " in line:
                self._ready = True
                self._news.set()
        self._news.set()

    def until_ready(self) -> None:
        """RuntimeError with its last words if it ends instead."""
        self._news.wait()
        if not self._ready:
            raise RuntimeError(f"the server did not start: {''.join(self._lines[-8:])}")


@dataclass
class Answer:
    """One request: its tokens, when each came, and how it ended."""

    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    end: End | None = None


async def ask(
    socket: Path, prompts: list[list[int]], at_once: bool, **sampling: Any
) -> list[Answer]:
    """All prompts on one connection, together or one after the other; greedy unless asked."""
    client = await RawClient.connect(socket)
    answers = [Answer() for _ in prompts]
    try:
        for number, prompt in enumerate(prompts):
            client.submit(number, prompt, **sampling)
            if not at_once:
                await read(client, answers, {number})
        await read(client, answers, set(range(len(prompts))))
    finally:
        await client.close()  # who is cancelled here hangs up, and that cancels its requests
    return answers


async def read(client: RawClient, answers: list[Answer], wanted: set[int]) -> None:
    """Until these have ended; every token gets the time at which its frame was read."""
    while any(answers[number].end is None for number in wanted):
        message = await client.read()
        now_s = time.perf_counter()
        if message is None:
            raise RuntimeError(f"the server closed the connection: {client.goodbye}")
        if isinstance(message, Tokens):
            for number, token_ids, _ in message.items:
                tokens = unpack_ids(token_ids)
                answers[number].tokens += tokens
                answers[number].times_s += [now_s] * len(tokens)
        elif isinstance(message, End):
            answers[message.request_id].end = message


def all_tokens(
    socket: Path, prompts: list[list[int]], num_tokens: int, at_once: bool = True
) -> list[list[int]]:
    """Greedy answers of a fixed length; RuntimeError when one ends otherwise."""
    answers = asyncio.run(ask(socket, prompts, at_once, max_tokens=num_tokens))
    for answer in answers:
        if answer.end is None or answer.end.code is not None or len(answer.tokens) != num_tokens:
            raise RuntimeError(f"{len(answer.tokens)} tokens of {num_tokens}, then {answer.end}")
    return [answer.tokens for answer in answers]


async def stats_of(socket: Path) -> dict[str, Any]:
    client = await RawClient.connect(socket)
    stats = await client.stats()
    await client.close()
    return stats
