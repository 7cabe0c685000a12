"""Client, the blocking one: the same answers, from any number of threads."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nodeserve import Client
from nodeserve.client import Chunk, Health
from nodeserve.errors import ConnectionLost, InvalidRequest
from nodeserve.wire.messages import Abort, Submit
from tests.fakes.server import VOCAB_SIZE, FakeServer, endless, saying


async def test_generate_chat_and_questions(server: FakeServer) -> None:
    server.script = saying("Paris")

    def use() -> None:
        with Client(server.path) as client:
            assert client.generate("France?", max_tokens=5).text == "Paris"
            assert client.chat([{"role": "user", "content": "x"}]).text == "Paris"
            assert "".join(c.text for c in client.generate([1], stream=True)) == "Paris"
            chunks = client.chat([{"role": "user", "content": "x"}], stream=True)
            assert "".join(chunk.text for chunk in chunks) == "Paris"
            assert client.health() == Health("ready", True, (), 0.0) and client.audit().adds_up
            assert client.server()["model"] == "fake"
            assert client.stats() == server.stats
            assert client.tokenizer().decode([104, 105]) == "hi"
            client.stop_server(drain=True)

    await asyncio.to_thread(use)
    assert not [thread for thread in threading.enumerate() if thread.name == "nodeserve-client"]


async def test_many_threads_share_one_connection(server: FakeServer) -> None:
    def ask(client: Client, number: int) -> None:
        if number % 2:
            ids = client.generate([number], detokenize=False).token_ids
        else:
            chunks = client.generate([number], detokenize=False, stream=True)
            ids = [token for chunk in chunks for token in chunk.token_ids]
        assert ids == [(number + place) % VOCAB_SIZE for place in range(3)]

    def use() -> None:
        with Client(server.path) as client, ThreadPoolExecutor(16) as pool:
            for done in [pool.submit(ask, client, number) for number in range(100)]:
                done.result()

    await asyncio.to_thread(use)
    assert len(server.peers) == 1
    assert server.count(Submit) == 100


async def test_streams_start_when_they_are_made(server: FakeServer) -> None:
    """One thread can have several requests running and read them one after the other."""

    def use() -> None:
        with Client(server.path) as client:
            streams = [client.generate([n], detokenize=False, stream=True) for n in range(3)]
            seen = asyncio.run_coroutine_threadsafe(server.until_received(Submit, 3), loop)
            seen.result()
            for number, chunks in enumerate(streams):
                ids = [token for chunk in chunks for token in chunk.token_ids]
                assert ids == [number, number + 1, number + 2]

    loop = asyncio.get_running_loop()
    await asyncio.to_thread(use)


@pytest.mark.parametrize("started", [False, True])
async def test_dropping_a_stream_aborts_it(server: FakeServer, started: bool) -> None:
    server.script = endless
    loop = asyncio.get_running_loop()

    def use() -> None:
        with Client(server.path) as client:
            chunks = client.generate([1], stream=True)
            if started:
                assert next(chunks) == Chunk("a", [ord("a")])
            del chunks
            asyncio.run_coroutine_threadsafe(server.until_received(Abort), loop).result()

    await asyncio.to_thread(use)


async def test_breaking_out_of_a_stream_aborts_it(server: FakeServer) -> None:
    server.script = endless
    loop = asyncio.get_running_loop()

    def use() -> None:
        with Client(server.path) as client:
            for _ in client.generate([1], stream=True):
                break
            asyncio.run_coroutine_threadsafe(server.until_received(Abort), loop).result()

    await asyncio.to_thread(use)


async def test_closing_ends_what_other_threads_wait_for(server: FakeServer) -> None:
    server.script = endless
    client = Client(server.path)
    waiting = asyncio.create_task(asyncio.to_thread(client.generate, [1]))
    await server.until_received(Submit)
    await asyncio.to_thread(client.close)
    with pytest.raises(ConnectionLost, match="client was closed"):
        await waiting
    with pytest.raises(ConnectionLost, match="this client is closed"):
        client.generate([1])
    client.close()


async def test_closing_does_not_wait_for_a_connection_being_made(tmp_path: Path) -> None:
    """A close once hung for good when something was left waiting in the client's loop."""
    connected, release = asyncio.Event(), asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        await release.wait()
        writer.close()

    async with await asyncio.start_unix_server(silent, str(tmp_path / "s")):
        client = Client(tmp_path / "s", connect_timeout_s=3600)
        waiting = asyncio.create_task(asyncio.to_thread(client.health))
        await connected.wait()
        await asyncio.to_thread(client.close)
        with pytest.raises(ConnectionLost, match="client was closed"):
            await waiting
        release.set()


async def test_errors_are_raised_where_the_call_was_made(server: FakeServer) -> None:
    def use() -> None:
        with Client(server.path) as client:
            with pytest.raises(InvalidRequest, match="temprature"):
                client.generate([1], temprature=0)
            with pytest.raises(InvalidRequest, match="temprature"):
                client.generate([1], temprature=0, stream=True)
            assert client.generate([1], detokenize=False).finish_reason == "length"

    await asyncio.to_thread(use)


def test_no_server_and_no_thread_before_the_first_call(tmp_path: Path) -> None:
    before = threading.active_count()
    with Client(tmp_path / "none") as client:
        assert threading.active_count() == before
        with pytest.raises(ConnectionLost, match="nodeserve start"):
            client.health()
