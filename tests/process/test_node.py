"""A node of real processes, through its real socket: what it promises when things go wrong."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nodeserve.wire.frames import HEADER, frame
from nodeserve.wire.messages import TO_SERVER, Abort, Stop, Submit, pack_ids
from tests.fakes.model import expected_stream
from tests.fakes.raw_client import RawClient
from tests.patience import PATIENCE_S
from tests.process.conftest import Connect, Nodes, names_of

LONG = 400  # tokens: still running when the fault comes
SLOW = {"step_s": 0.01}  # for certain, where a test depends on it


async def settled(client: RawClient) -> dict[str, Any]:
    """The stats once nothing runs and every block is free; the test's timeout bounds it."""
    while True:
        stats = await client.stats()
        workers = stats["workers"]
        busy = stats["requests"]["queued"] + stats["requests"]["running"]
        if not busy and all(w["free_blocks"] == w["num_blocks"] for w in workers):
            return stats


@pytest.mark.parametrize("layout", ["1m", "1p1d", "2p1d", "1p2d"])
async def test_many_requests_stream_and_nothing_is_left(
    nodes: Nodes, connect: Connect, layout: str
) -> None:
    node = nodes.start(layout=layout)
    client = await connect(node)
    prompts = [[(i * 7 + k) % 97 for k in range(1 + i * 5)] for i in range(20)]
    for i, prompt in enumerate(prompts):
        client.submit(i, prompt, max_tokens=30)
    await client.finish(*range(20))
    for i, prompt in enumerate(prompts):
        assert client.tokens[i] == expected_stream(prompt, 30)
        (end,) = client.ends[i]
        assert end.reason == "length"
        assert (end.timings["handoff_bytes"] > 0) == (layout != "1m")
    await settled(client)
    workers = node.worker_pids()
    client.send(Stop(False))
    await client.read_to_end()
    assert client.goodbye is not None and client.goodbye.code == "shutting_down"
    assert node.wait() == 0
    assert not node.socket.exists() and not names_of(node.pid)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


GARBAGE = {
    "not msgpack": (frame(b"\xc1\xc1\xc1"), "protocol"),
    "not an array": (frame(b"\x07"), "protocol"),
    "unknown message": (frame(b"\x91\x63"), "protocol"),
    "missing fields": (frame(b"\x92\x00\x01"), "protocol"),
    "wrong type": (frame(b"\x92\x01\xa1x"), "protocol"),
    "over the limit": (HEADER.pack(1 << 30), "frame_too_large"),
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_garbage_closes_its_connection_and_no_other(
    nodes: Nodes, connect: Connect, name: str
) -> None:
    node = nodes.start(layout="1p1d")
    good, bad = [await connect(node) for _ in range(2)]
    good.submit(1, [5, 6, 7], max_tokens=100)
    bad.submit(1, [1], max_tokens=LONG)
    data, code = GARBAGE[name]
    bad.writer.write(data)
    await bad.read_to_end()
    assert bad.goodbye is not None and bad.goodbye.code == code
    await good.finish(1)
    assert good.tokens[1] == expected_stream([5, 6, 7], 100)
    await settled(good)


async def test_half_a_frame_and_a_hangup_leave_nothing(nodes: Nodes, connect: Connect) -> None:
    node = nodes.start(layout="1p1d", fake=SLOW)
    good, bad = [await connect(node) for _ in range(2)]
    bad.submit(1, [1], max_tokens=LONG)
    bad.writer.write(HEADER.pack(100) + b"half")
    await bad.read_until(lambda: bool(bad.tokens))
    await bad.close()
    stats = await settled(good)
    assert stats["requests"]["cancelled"] == 1


async def test_ten_thousand_requests_at_once_each_end_once(nodes: Nodes, connect: Connect) -> None:
    node = nodes.start(layout="1p1d", max_num_queued_reqs=500)
    client = await connect(node)
    for i in range(10_000):
        client.submit(i, [i % 97], max_tokens=2)
    await client.finish(*range(10_000))
    assert all(len(ends) == 1 for ends in client.ends.values())
    assert {end.code for ends in client.ends.values() for end in ends} == {None, "overloaded"}
    for i, (end,) in client.ends.items():
        if end.code is None:
            assert client.tokens[i] == expected_stream([i % 97], 2)
    await settled(client)


async def test_a_client_that_never_reads_disturbs_nobody(nodes: Nodes, connect: Connect) -> None:
    node = nodes.start(layout="1p1d")
    good = await connect(node)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(str(node.socket))
        deaf.sendall(b"".join(_submits(3000)))
        good.submit(1, [9], max_tokens=50)
        await good.finish(1)
        assert good.tokens[1] == expected_stream([9], 50)
    await settled(good)


def _submits(count: int) -> Iterator[bytes]:
    sampling = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 10, "logprobs": 5}
    for i in range(count):
        yield frame(TO_SERVER.encode(Submit(i, pack_ids([1]), sampling, None, 0)))


async def test_a_client_killed_mid_stream_frees_everything(nodes: Nodes, connect: Connect) -> None:
    node = nodes.start(layout="1p1d")
    good = await connect(node)
    script = (
        "import asyncio, pathlib, sys\n"
        "from tests.fakes.raw_client import RawClient\n"
        "async def run():\n"
        "    client = await RawClient.connect(pathlib.Path(sys.argv[1]))\n"
        f"    for i in range(8): client.submit(i, [i], max_tokens={LONG})\n"
        "    await client.read_until(lambda: len(client.tokens) == 8)\n"
        "    print('streaming', flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(run())\n"
    )
    victim = subprocess.Popen(
        [sys.executable, "-c", script, str(node.socket)], stdout=subprocess.PIPE, text=True
    )
    with victim:
        assert victim.stdout is not None and victim.stdout.readline() == "streaming\n"
        victim.kill()
    stats = await settled(good)
    requests = stats["requests"]
    assert requests["cancelled"] + requests["finished"] == 8


@pytest.mark.parametrize("after", [0, 1, 5])
async def test_abort_ends_once_and_frees_both_sides(
    nodes: Nodes, connect: Connect, after: int
) -> None:
    node = nodes.start(layout="1p1d", fake=SLOW)
    client = await connect(node)
    client.submit(1, list(range(90)), max_tokens=LONG)
    await client.read_until(lambda: len(client.tokens.get(1, [])) >= after)
    client.send(Abort(1))
    client.send(Abort(1))  # crossed with the End: ignored
    await client.finish(1)
    await settled(client)
    assert [end.reason for end in client.ends[1]] == ["cancelled"]
    got = client.tokens.get(1, [])
    assert got == expected_stream(list(range(90)), LONG)[: len(got)]


def test_a_worker_killed_while_it_loads_fails_the_start(nodes: Nodes) -> None:
    node = nodes.spawn(layout="2m", fake={"load_s": 60.0})
    while len(workers := node.worker_pids()) < 2:
        assert node.process.poll() is None
    os.kill(workers[0], signal.SIGKILL)
    _, words = node.process.communicate(timeout=PATIENCE_S)
    assert node.process.returncode == 1 and "was killed by SIGKILL" in words
    assert not node.socket.exists() and not names_of(node.pid)


def test_a_second_server_is_refused_and_a_stale_socket_replaced(nodes: Nodes) -> None:
    first = nodes.start(layout="1m")
    second = nodes.spawn(socket=first.socket, layout="1m")
    _, words = second.process.communicate(timeout=PATIENCE_S)
    assert second.process.returncode == 1 and "already running" in words
    os.kill(first.janitor_pid(), signal.SIGKILL)
    first.process.kill()
    first.process.communicate()
    assert first.socket.exists()
    third = nodes.spawn(socket=first.socket, layout="1m")
    assert third.process.stdout is not None and third.process.stdout.readline() == "ready\n"
    assert (third.socket.stat().st_mode & 0o777) == 0o600


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"layout": "4p"}, "nobody for decode"),
        ({"layout": "1p:tp2,1d"}, "tp2 does not fit a model of 1 attention heads"),
        ({"device": "cuda"}, "--device cuda: a test has none"),
        ({"block_size": 10}, "multiple of 16"),
        ({"kv_memory": 1000}, "--kv-memory 1000 is below"),
        ({"max_model_len": 100_000}, "--max-model-len 100000"),
        ({"fake": {"load_error": "no such weights"}}, "no such weights"),
    ],
)
def test_a_start_that_cannot_work_says_why(
    nodes: Nodes, settings: dict[str, Any], word: str
) -> None:
    node = nodes.spawn(**{"layout": "1m", **settings})
    _, words = node.process.communicate(timeout=PATIENCE_S)
    assert node.process.returncode == 1 and word in words
    assert not node.socket.exists() and not names_of(node.pid)
