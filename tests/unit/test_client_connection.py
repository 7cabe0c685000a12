"""AsyncClient and its connection: leaving requests, sharing, losing and making it again."""

import asyncio
import contextlib
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from nodeserve import AsyncClient
from nodeserve.client import Audit, Health
from nodeserve.errors import (
    Cancelled,
    ConnectionLost,
    NodeServeError,
    ProtocolError,
    ShuttingDown,
)
from nodeserve.wire.frames import frame
from nodeserve.wire.messages import (
    PROTOCOL_VERSION,
    TO_CLIENT,
    Abort,
    GetStats,
    Goodbye,
    Hello,
    Stats,
    Stop,
    Submit,
    Tokens,
)
from tests.fakes.server import VOCAB_SIZE, FakeServer, Peer, answer, endless, tokens_for

NEXT = PROTOCOL_VERSION + 1


# ---- leaving a request


async def leave_by_break(client: AsyncClient) -> None:
    async for _ in client.generate([1], stream=True):
        break


async def leave_by_exception(client: AsyncClient) -> None:
    with contextlib.suppress(ZeroDivisionError):
        async for _ in client.generate([1], stream=True):
            raise ZeroDivisionError


async def leave_by_aclose(client: AsyncClient) -> None:
    chunks = client.generate([1], stream=True)
    await anext(chunks)
    await chunks.aclose()


async def leave_by_dropping(client: AsyncClient) -> None:
    chunks = client.generate([1], stream=True)
    await anext(chunks)
    del chunks


async def leave_by_cancelling_a_stream(client: AsyncClient) -> None:
    started = asyncio.Event()

    async def read() -> None:
        async for _ in client.generate([1], stream=True):
            started.set()

    await cancelled(asyncio.create_task(read()), started.wait())


async def cancelled(task: "asyncio.Task[Any]", when: Coroutine[Any, Any, Any]) -> None:
    await when
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    "leave",
    [
        leave_by_break,
        leave_by_exception,
        leave_by_aclose,
        leave_by_dropping,
        leave_by_cancelling_a_stream,
    ],
)
async def test_leaving_a_request_aborts_it_and_nothing_else(
    server: FakeServer, client: AsyncClient, leave: Any
) -> None:
    server.script = endless
    await client.tokenizer()
    other = asyncio.create_task(anext(client.generate([9], stream=True)))
    await other
    before = server.count(Abort)
    await leave(client)
    await server.until_received(Abort, before + 1)
    server.script = answer
    assert (await client.generate([1])).finish_reason == "length"
    assert len(server.peers) == 1


async def test_cancelling_a_whole_completion_aborts_it(
    server: FakeServer, client: AsyncClient
) -> None:
    server.script = endless
    task = asyncio.create_task(client.generate([1]))
    await cancelled(task, server.until_received(Submit))
    await server.until_received(Abort)


async def test_aborting_a_call_ends_who_waits_for_it(
    server: FakeServer, client: AsyncClient
) -> None:
    server.script = endless
    call = await client.start([1], detokenize=False)
    assert (await call.chunk()) is not None
    waiting = asyncio.create_task(call.chunk())
    await client.stats()
    call.abort()
    with pytest.raises(Cancelled):
        await waiting
    assert await call.chunk() is None


async def test_a_finished_request_is_not_aborted(server: FakeServer, client: AsyncClient) -> None:
    async for _ in client.generate([1], stream=True):
        pass
    await client.stats()
    assert server.count(Abort) == 0


async def test_what_comes_after_leaving_is_ignored(server: FakeServer, client: AsyncClient) -> None:
    server.script = endless
    await leave_by_break(client)
    await server.until_received(Abort)
    (submit,) = server.submits
    server.peers[0].tokens(submit.request_id, [1, 2])
    server.peers[0].end(submit, "cancelled", 3, "cancelled")
    server.script = answer
    assert (await client.generate([1])).finish_reason == "length"


# ---- the connection


async def test_many_requests_share_one_connection(server: FakeServer, client: AsyncClient) -> None:
    """Answers are mixed on purpose: every request gets its own tokens, in order."""
    everyone = asyncio.Event()

    async def script(peer: Peer, submit: Submit) -> None:
        ids = tokens_for(submit)
        peer.tokens(submit.request_id, ids[:1])
        if len(server.submits) == 300:
            everyone.set()
        await everyone.wait()
        peer.tokens(submit.request_id, ids[1:])
        peer.end(submit, "length", len(ids))

    server.script = script
    prompts = [[n % 50, n // 50] for n in range(300)]
    done = await asyncio.gather(*(client.generate(p, detokenize=False) for p in prompts))
    for prompt, completion in zip(prompts, done, strict=True):
        assert completion.token_ids == [(sum(prompt) + place) % VOCAB_SIZE for place in range(3)]
    assert len(server.peers) == 1


async def test_a_lost_connection_ends_its_requests_and_the_next_call_connects_again(
    server: FakeServer, client: AsyncClient
) -> None:
    async def script(peer: Peer, submit: Submit) -> None:
        peer.tokens(submit.request_id, [ord("a")])
        peer.close()

    server.script = script
    texts = []
    with pytest.raises(ConnectionLost, match="connection to the server ended"):
        async for chunk in client.generate([1], stream=True):
            texts.append(chunk.text)
    assert texts == ["a"]
    server.script = answer
    assert (await client.generate([1])).finish_reason == "length"
    assert len(server.peers) == 2
    assert len(server.submits) == 2  # nothing was sent again


async def test_without_a_server_the_error_says_what_to_do(tmp_path: Path) -> None:
    async with AsyncClient(tmp_path / "none") as client:
        for _ in range(2):
            with pytest.raises(ConnectionLost, match="nodeserve start"):
                await client.health()


async def test_a_server_that_is_still_loading_is_waited_for_in_vain(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.close()

    async with await asyncio.start_unix_server(silent, str(tmp_path / "s")):
        client = AsyncClient(tmp_path / "s", connect_timeout_s=0.02)
        with pytest.raises(ConnectionLost, match="did not answer in 0.02 s"):
            await client.server()
        release.set()


@pytest.mark.parametrize(
    ("welcome", "error", "words"),
    [
        (Hello(NEXT, {}), ProtocolError, f"version {NEXT}, this client {PROTOCOL_VERSION}"),
        (Stats({}), ProtocolError, "first message is Stats"),
        (Hello(PROTOCOL_VERSION, {}), ProtocolError, "Hello has no model that is str"),
        (Hello(PROTOCOL_VERSION, {"model": 7}), ProtocolError, "no model that is str"),
        (Goodbye("shutting_down", "bye"), ShuttingDown, "bye"),
    ],
)
async def test_a_wrong_first_message_is_named(
    tmp_path: Path, welcome: Any, error: type[NodeServeError], words: str
) -> None:
    async with FakeServer(tmp_path / "s", welcome=welcome) as server:
        client = AsyncClient(server.path)
        with pytest.raises(error, match=words):
            await client.server()


@pytest.mark.parametrize(
    "data",
    [
        frame(b"\xc1"),
        frame(b"\x91\x63"),
        b"\xff\xff\xff\xff",
        frame(TO_CLIENT.encode(Tokens([[0]]))),
        frame(TO_CLIENT.encode(Tokens([[0, b"abc", None]]))),
        frame(TO_CLIENT.encode(Tokens(["x"]))),
        frame(TO_CLIENT.encode(Stats({}))),
        frame(TO_CLIENT.encode(Hello(PROTOCOL_VERSION, {}))),
    ],
)
async def test_a_server_that_breaks_the_protocol_is_left(
    server: FakeServer, client: AsyncClient, data: bytes
) -> None:
    async def script(peer: Peer, submit: Submit) -> None:
        peer.send_raw(data)

    server.script = script
    with pytest.raises(ProtocolError):
        await client.generate([1])
    server.script = answer
    assert (await client.generate([1])).finish_reason == "length"
    assert len(server.peers) == 2


@pytest.mark.parametrize("entries", [None, [], [[1]], [["a", b"", b""]], [[-0.5, b"1234", b""]]])
async def test_log_probabilities_that_are_none_are_refused(
    server: FakeServer, client: AsyncClient, entries: Any
) -> None:
    async def script(peer: Peer, submit: Submit) -> None:
        peer.tokens(submit.request_id, [1], entries)

    server.script = script
    with pytest.raises(ProtocolError, match="log"):
        await client.generate([1], logprobs=1)
    await server.until_received(Abort)


async def test_goodbye_ends_everything_with_its_reason(
    server: FakeServer, client: AsyncClient
) -> None:
    server.script = endless
    running = [asyncio.create_task(client.generate([n])) for n in range(3)]
    await server.until_received(Submit, 3)
    server.peers[0].send(Goodbye("shutting_down", "the server was stopped"))
    for task in running:
        with pytest.raises(ShuttingDown, match="was stopped"):
            await task


async def test_closing_the_client_ends_what_runs(server: FakeServer, client: AsyncClient) -> None:
    server.script = endless
    running = asyncio.create_task(client.generate([1]))
    await server.until_received(Submit)
    await client.aclose()
    with pytest.raises(ConnectionLost, match="client was closed"):
        await running
    server.script = answer
    assert (await client.generate([1])).finish_reason == "length"


# ---- questions about the server


async def test_health_audit_and_stats(server: FakeServer, client: AsyncClient) -> None:
    assert await client.health() == Health("ready", True, (), 0.0)
    server.health = {"state": "stopping", "reasons": ["why"], "loop_lag_ms": 250.0, "new": 1}
    assert await client.health() == Health("stopping", False, ("why",), 0.25)
    assert (await client.audit()).adds_up
    server.audit = {"problems": ["a block"], "requests": {"decode": 1}, "workers": [{"index": 0}]}
    audit = await client.audit()
    assert audit == Audit(("a block",), {"decode": 1}, [{"index": 0}]) and not audit.adds_up
    assert (await client.server())["layout"] == "1p1d"
    server.stats = {"model": "other"}
    answers = await asyncio.gather(*(client.stats() for _ in range(5)))
    assert answers == [{"model": "other"}] * 5
    assert server.count(GetStats) == 5


async def test_a_server_that_no_longer_answers_has_no_health(
    server: FakeServer, client: AsyncClient
) -> None:
    await client.server()
    server.is_stuck = True
    with pytest.raises(ConnectionLost, match="did not answer in 0.01 s"):
        await client.health(0.01)
    server.is_stuck = False
    assert (await client.health()).ready


@pytest.mark.parametrize("drain", [False, True])
async def test_stopping_the_server_waits_for_its_goodbye(
    server: FakeServer, client: AsyncClient, drain: bool
) -> None:
    await client.stop_server(drain=drain)
    assert server.received == [Stop(drain)]


async def test_callers_share_an_attempt_to_connect(tmp_path: Path) -> None:
    """One after another each waited for a server that still loads until its own timeout."""
    path = tmp_path / "socket"
    silent = socket.socket(socket.AF_UNIX)
    with silent:
        silent.bind(str(path))
        silent.listen()
        async with AsyncClient(path, connect_timeout_s=0.05) as client:
            asked = [asyncio.create_task(client.server()) for _ in range(3)]
            await asyncio.sleep(0)  # all of them wait
            asked[0].cancel()
            ends = await asyncio.gather(*asked, return_exceptions=True)
            assert isinstance(ends[0], asyncio.CancelledError)
            assert isinstance(ends[1], ConnectionLost) and ends[1] is ends[2]
            with pytest.raises(ConnectionLost, match="did not answer"):
                await client.server()
