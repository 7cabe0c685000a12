"""Readers of bytes from outside, as functions of bytes: each raises only when we have a bug.

A reader may refuse with the typed error that it promises, and no other. What it accepts is looked
at as its users would.
"""

import asyncio
import atexit
import contextlib
import functools
import math
import random
import shutil
import tempfile
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nodeserve import profile_store
from nodeserve.checkpoint import Checkpoint
from nodeserve.client.connection import Connection
from nodeserve.config import ModelConfig, parse_slo
from nodeserve.config_readers import folder_config
from nodeserve.config_readers.gguf import gguf_config
from nodeserve.coordinator.records import message_of
from nodeserve.errors import (
    ConfigError,
    FrameTooLarge,
    InvalidRequest,
    ModelError,
    NodeServeError,
    ProtocolError,
)
from nodeserve.expert_counts import read_counts
from nodeserve.gateway.asked import chat_of, completion_of
from nodeserve.gateway.engine import packed
from nodeserve.gateway.fields import json_object
from nodeserve.gateway.problems import HttpProblem
from nodeserve.gateway.response_asked import response_of
from nodeserve.gguf import GgufFile, StringArray
from nodeserve.layout import parse_gpus, parse_layout
from nodeserve.plan.workloads import read_trace
from nodeserve.text.chat import checked_messages
from nodeserve.types import Role, check_sampling, sampling_from
from nodeserve.wire import messages
from nodeserve.wire.frames import FrameReader
from nodeserve.wire.tagged import Tagged
from tests.fakes.connected import ConnectedClient
from tests.fakes.node import FakeNode
from tests.fuzz import seeds

MAX_FRAME_BYTES = 1 << 12
MAX_ERROR_CHARACTERS = 2000
UNIONS: list[Any] = [
    messages.ToServer,
    messages.ToClient,
    messages.ToWorker,
    messages.FromWorker,
]
SHAPE = ModelConfig("llama", 8, 4, 6, 1, 1, 1, 4, 16, 1e-5, 1e4)


@dataclass(frozen=True)
class Target:
    """`run` reads one input; `seeds` are inputs worth changing."""

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    max_bytes: int = 4096


def frames(data: bytes) -> None:
    """However a stream is cut, the same payloads come out, or the same refusal."""
    if len(data) < 2:
        return
    cut, stream = data[0] + 1, data[1:]
    whole, parts = _cut(stream, len(stream)), _cut(stream, cut)
    assert whole.refused == parts.refused
    assert whole.refused or whole.payloads == parts.payloads
    assert all(len(payload) <= MAX_FRAME_BYTES for payload in whole.payloads)


class _Read(typing.NamedTuple):
    payloads: list[bytes]
    refused: bool


def _cut(stream: bytes, size: int) -> _Read:
    reader, payloads = FrameReader(MAX_FRAME_BYTES), []
    try:
        for start in range(0, len(stream), size):
            payloads += reader.feed(stream[start : start + size])
    except FrameTooLarge:
        return _Read(payloads, True)
    return _Read(payloads, False)


def decoded(data: bytes) -> None:
    """A message of the union, which travels on unchanged, or a ProtocolError."""
    if not data:
        return
    which = data[0] % len(UNIONS)
    coder: Tagged[Any] = list(seeds.CODERS.values())[which]
    try:
        message = coder.decode(data[1:])
    except ProtocolError as error:
        assert len(str(error)) < MAX_ERROR_CHARACTERS
        return
    assert type(message) in typing.get_args(UNIONS[which])
    again = coder.encode(message)
    assert coder.encode(coder.decode(again)) == again


class _Sink(asyncio.Transport):
    """What a client's connection writes to: nowhere."""

    def write(self, data: Any) -> None:
        pass

    def abort(self) -> None:
        pass


_LOOP = asyncio.new_event_loop()


def client(data: bytes) -> None:
    """A server may send anything: the client's calls end with what came or a typed error."""
    _LOOP.run_until_complete(_serve(data))


async def _serve(data: bytes) -> None:
    connection = Connection()
    connection.connection_made(_Sink())
    connection.data_received(seeds.HELLO)
    mailboxes = [(await connection.submit(b"", {}, None, 0))[1] for _ in range(2)]
    stats = asyncio.ensure_future(connection.stats())
    await asyncio.sleep(0)
    for start in range(0, len(data), 64):
        connection.data_received(data[start : start + 64])
    connection.connection_lost(None)
    with contextlib.suppress(NodeServeError):
        await stats
    for mailbox in mailboxes:
        assert await mailbox.take()


def server(data: bytes) -> None:
    """A client may send anything: it is answered or let go, and nothing of it stays."""
    _LOOP.run_until_complete(_listen(data))


async def _listen(data: bytes) -> None:
    node, chance = FakeNode([Role.PREFILL, Role.DECODE]), random.Random(0)
    person = ConnectedClient(node)
    for start in range(0, len(data), 64):
        person.connection.data_received(data[start : start + 64])
        node.act(chance)
    while not person.transport.reads and not person.transport.closed:  # noqa: ASYNC110  # a turn
        await asyncio.sleep(0)
    assert len(person.transport.goodbyes) == person.transport.closed
    person.leave()
    node.run_to_idle(chance)
    node.check_nothing_held()
    assert not node.coordinator.streams


def worker(data: bytes) -> None:
    """A worker may say anything: whatever it was, every request ends once and nothing stays."""
    if data:
        _LOOP.run_until_complete(_hear(data))


async def _hear(data: bytes) -> None:
    node, chance = FakeNode([Role.PREFILL, Role.DECODE, Role.MIXED]), random.Random(data[0])
    stream, told = node.connect()
    for request_id in range(1, 5):
        node.submit(stream, request_id, [request_id] * 20, 6)
    for _ in range(data[0]):
        node.act(chance)
    liar = node.workers[data[0] % len(node.workers)]
    with contextlib.suppress(NodeServeError):
        node.coordinator.handle(liar.link, message_of(data[1:]))
    node.act(chance)
    node.lose(liar)
    node.restart(liar.link.instance)
    node.run_to_idle(chance)
    node.check_nothing_held()
    assert sorted(told.ends) == [1, 2, 3, 4]
    assert all(len(ends) == 1 for ends in told.ends.values())


def http(data: bytes) -> None:
    """The body of an HTTP request: what is asked, or the field that is wrong."""
    for read, described in _http_readers():
        with _only(InvalidRequest, HttpProblem):
            body = json_object(data)
            asked = read(body, {})
            check_sampling(sampling_from(asked.sampling), 1 << 31)
            for prompt in asked.prompts:
                packed(prompt if isinstance(prompt, list) else [])
            checked_messages([{"role": "user", "content": ""}, *(asked.messages or ())])
            assert described.is_valid(body), "it is taken, and /openapi.json says otherwise"


@functools.cache
def _http_readers() -> list[tuple[Any, Any]]:
    """What reads a body, and what /openapi.json says of it."""
    from jsonschema import Draft202012Validator

    from nodeserve.gateway.openapi import OPERATIONS, body_schema

    schemas = {one.name: Draft202012Validator(body_schema(one)) for one in OPERATIONS if one.body}
    readers = {"completions": completion_of, "chat": chat_of, "responses": response_of}
    return [(read, schemas[name]) for name, read in readers.items()]


def layout(data: bytes) -> None:
    """Layouts, devices and limits on the command line; a layout that is read says so again."""
    text = data.decode("utf-8", "replace")
    with contextlib.suppress(ConfigError):
        found = parse_layout(text)
        assert parse_layout(str(found)) == found
    for parse in (parse_gpus, parse_slo):
        with contextlib.suppress(ConfigError):
            parse(text)


def gguf(data: bytes) -> None:
    """Metadata, tensors and the shape of a model."""
    with _file("m.gguf", data) as path, _only(ModelError):
        file = GgufFile(path)
        ends = [one.offset + one.num_bytes for one in file.tensors.values()]
        assert all(end <= len(data) for end in ends)
        for value in file.metadata.values():
            assert not isinstance(value, StringArray) or len(value.strings()) == len(value)
        gguf_config(file)


def vocabulary(data: bytes) -> None:
    """The tokenizer in a GGUF file, and text through it."""
    from nodeserve.text import Tokenizer

    with _file("m.gguf", data) as path, _only(ModelError):
        tokenizer = Tokenizer.load(path)
        tokenizer.decode(tokenizer.encode("hello \N{GRINNING FACE}"))


def tokenizer(data: bytes) -> None:
    """A folder's tokenizer.json, and text through it."""
    from nodeserve.text import Tokenizer

    with _file("tokenizer.json", data) as path, _only(ModelError):
        found = Tokenizer.load(path.parent)
        found.decode(found.encode("hello \N{GRINNING FACE}"))


def config(data: bytes) -> None:
    """A folder's config.json."""
    with _file("config.json", data) as path, _only(ModelError):
        folder_config(path.parent)


def safetensors(data: bytes) -> None:
    """Weights in a folder: the file, or the index if it begins as JSON does."""
    import torch

    from nodeserve.model.loader import SafetensorsWeights

    name = "model.safetensors.index.json" if data[:1] == b"{" else "model.safetensors"
    with _file(name, data) as path, _only(ModelError):
        checkpoint = Checkpoint(path.parent, "safetensors", SHAPE, "fuzz")
        weights = SafetensorsWeights(checkpoint, torch.float32)
        for tensor in list(weights._places)[:4]:
            weights(tensor)


def trace(data: bytes) -> None:
    """Requests for a simulation or a benchmark from a CSV file."""
    with _file("trace.csv", data) as path, _only(ConfigError):
        arrivals = read_trace(path)
        assert arrivals[0].arrived_s == 0.0
        assert all(one.num_prompt_tokens >= 1 <= one.num_output_tokens for one in arrivals)


def profile(data: bytes) -> None:
    """A stored profile."""
    with _file("profile.json", data) as path, _only(ConfigError):
        profile_store.read(path)


def counts(data: bytes) -> None:
    """How often experts were chosen."""
    with _file("counts.json", data) as path, _only(ConfigError):
        (rows,) = read_counts(path, seeds.SPARSE)
        assert len(rows) == 4 and all(0.0 <= one < math.inf for one in rows)


@contextlib.contextmanager
def _only(*kinds: type[Exception]) -> Iterator[None]:
    """These errors are refusals, and short; any other is our bug."""
    try:
        yield
    except kinds as error:
        assert len(str(error)) < MAX_ERROR_CHARACTERS, f"{len(str(error))} characters of error"


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="nodeserve-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextlib.contextmanager
def _file(name: str, data: bytes) -> Iterator[Path]:
    """A file of that name in a folder without others."""
    path = _folder() / name
    path.write_bytes(data)
    try:
        yield path
    finally:
        path.unlink()


TARGETS = {
    target.name: target
    for target in (
        Target("frames", frames, seeds.frames),
        Target("messages", decoded, seeds.messages),
        Target("client", client, seeds.to_client),
        Target("server", server, seeds.to_server),
        Target("worker", worker, seeds.to_coordinator),
        Target("http", http, seeds.bodies),
        Target("layout", layout, seeds.layouts, 200),
        Target("config", config, seeds.configs),
        Target("gguf", gguf, seeds.ggufs, 1 << 14),
        Target("vocabulary", vocabulary, seeds.vocabularies, 1 << 15),
        Target("tokenizer", tokenizer, seeds.tokenizers, 1 << 15),
        Target("safetensors", safetensors, seeds.safetensors),
        Target("trace", trace, seeds.traces),
        Target("profile", profile, seeds.profiles),
        Target("counts", counts, seeds.counts),
    )
}
