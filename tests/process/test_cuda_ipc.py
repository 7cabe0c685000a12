"""Pools and events of `_cuda` between two real processes, over the fake runtime."""

import contextlib
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nodeserve.errors import CudaError
from tests.fakes.cuda import bytes_at, load_fake_cuda

NUM_BLOCKS, BLOCK_BYTES = 64, 48 * 1024
POOL_BYTES = NUM_BLOCKS * BLOCK_BYTES


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """In this process and in those it spawns, no work runs before somebody waits for it."""
    module = load_fake_cuda()
    monkeypatch.setenv("NODESERVE_FAKE_CUDA_MODE", "lazy")
    module.fake.reload_environment()
    yield module
    monkeypatch.undo()
    module.fake.reload_environment()


@contextlib.contextmanager
def peer(body: Callable[..., None]) -> Iterator[tuple[Connection, Any]]:
    """`body(cuda, connection)` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(body, theirs))
    process.start()
    theirs.close()
    try:
        yield ours, process
        process.join()
        assert process.exitcode == 0
    finally:
        ours.close()
        process.kill()
        process.join()


def _run(body: Callable[..., None], connection: Connection) -> None:
    body(load_fake_cuda(), connection)


def permuted() -> np.ndarray[Any, np.dtype[np.int32]]:
    """[NUM_BLOCKS, 2]: every block, elsewhere, some neighbours together."""
    order = np.random.default_rng(1).permutation(NUM_BLOCKS // 4)
    sources = (order[:, None] * 4 + np.arange(4)).reshape(-1)
    return np.stack([np.arange(NUM_BLOCKS), sources], 1).astype(np.int32)


def pull(cuda: Any, ours: Any, theirs: Any, stream: Any, method: str) -> None:
    cuda.copy_pages(
        *(ours.address, POOL_BYTES, theirs.address, POOL_BYTES),
        permuted(),
        np.array([[0, 0, BLOCK_BYTES]]),
        target_stride=BLOCK_BYTES,
        source_stride=BLOCK_BYTES,
        stream=stream.handle,
        method=method,
    )


def pull_on_request(cuda: Any, connection: Connection) -> None:
    """Opens what it is sent, and copies every block each time it is told how."""
    pool_handle, event_handle = connection.recv()
    theirs, written = cuda.PeerPool(1, pool_handle, POOL_BYTES), cuda.Event.open(1, event_handle)
    ours, stream = cuda.Pool(1, POOL_BYTES), cuda.Stream(1)
    for method, waits in iter(connection.recv, None):
        if waits:
            written.make_wait(stream.handle)
        pull(cuda, ours, theirs, stream, method)
        connection.send(written.done())
        stream.synchronize()
        connection.send(bytes(bytes_at(ours.address, POOL_BYTES)))
    stream.close()
    written.close()
    theirs.close()
    ours.close()


def test_every_block_of_every_generation_reaches_a_peer(cuda: Any) -> None:
    """Its stream waits for work that we have not done yet; without the wait it sees old bytes."""
    pool, stream, written = (
        cuda.Pool(0, POOL_BYTES),
        cuda.Stream(0),
        cuda.Event(0, interprocess=True),
    )
    mine = bytes_at(pool.address, POOL_BYTES).reshape(NUM_BLOCKS, BLOCK_BYTES)
    rng = np.random.default_rng(2)
    with peer(pull_on_request) as (connection, _):
        connection.send((pool.handle(), written.handle()))
        for generation, method in enumerate(["kernel", "batch", "kernel", "batch"]):
            waits = generation < 3
            mine[:] = rng.integers(0, 256, mine.shape, np.uint8)
            # The last word of a generation, written by the device: block 5 is its number.
            before = mine[5].copy()
            cuda.fake.fill(stream.handle, pool.address + 5 * BLOCK_BYTES, generation, BLOCK_BYTES)
            written.record(stream.handle)
            connection.send((method, waits))
            assert connection.recv() is False  # not done: nobody waited for our stream
            if waits:
                stream.synchronize()
            arrived = np.frombuffer(connection.recv(), np.uint8).reshape(mine.shape)
            stream.synchronize()
            sent = mine.copy()
            assert (sent[5] == generation).all()
            if not waits:
                sent[5] = before
            assert (arrived == sent[permuted()[:, 1]]).all()
        connection.send(None)


def test_streams_that_go_on_by_themselves_meet_at_an_event(
    cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the owner starts its work and looks after it no more."""
    monkeypatch.setenv("NODESERVE_FAKE_CUDA_MODE", "threaded")
    cuda.fake.reload_environment()
    pool, stream = cuda.Pool(0, POOL_BYTES), cuda.Stream(0)
    written = cuda.Event(0, interprocess=True)
    with peer(pull_on_request) as (connection, _):
        connection.send((pool.handle(), written.handle()))
        for generation in range(1, 5):
            cuda.fake.fill(stream.handle, pool.address, generation, POOL_BYTES)
            written.record(stream.handle)
            connection.send((["kernel", "batch"][generation % 2], True))
            connection.recv()
            assert set(connection.recv()) == {generation}
        connection.send(None)


def test_device_memory_has_no_name_that_could_be_left_behind(cuda: Any) -> None:
    pool, event = cuda.Pool(0, 16), cuda.Event(0, interprocess=True)
    maps = Path("/proc/self/maps").read_text().splitlines()
    (line,) = (line for line in maps if line.startswith(f"{pool.address:x}-"))
    assert line.endswith("/memfd:fake-cuda (deleted)")
    assert len(event.handle()) == 64


def export_and_end(cuda: Any, connection: Connection) -> None:
    pool, event = cuda.Pool(0, 4096), cuda.Event(0, interprocess=True)
    connection.send((pool.handle(), event.handle()))
    connection.recv()


def test_a_pool_whose_owner_ended_cannot_be_opened(cuda: Any) -> None:
    with peer(export_and_end) as (connection, _):
        pool_handle, event_handle = connection.recv()
        opened = cuda.PeerPool(0, pool_handle, 4096)
        assert opened.num_bytes == 4096 and not bytes_at(opened.address, 4096).any()
        opened.close()
        opened.close()
        with pytest.raises(ValueError, match="^the peer's pool is closed"):
            _ = opened.address
        event = cuda.Event.open(0, event_handle)
        with pytest.raises(ValueError, match="^the event has no handle: only its owner exports it"):
            event.handle()
        cuda.fake.fail("cudaIpcCloseMemHandle", number=2)
        with pytest.raises(CudaError, match="cudaIpcCloseMemHandle: out of memory"):
            cuda.PeerPool(0, pool_handle, 4096).close()
        connection.send("end")
    with pytest.raises(CudaError, match="cudaIpcOpenMemHandle: invalid resource handle"):
        cuda.PeerPool(0, pool_handle, 4096)
    with pytest.raises(CudaError, match="cudaIpcOpenEventHandle: invalid resource handle"):
        cuda.Event.open(0, event_handle)


def record_and_finish_later(cuda: Any, connection: Connection) -> None:
    stream, event = cuda.Stream(0), cuda.Event(0, interprocess=True)
    event.record(stream.handle)
    connection.send(event.handle())
    connection.recv()
    stream.synchronize()
    connection.recv()  # the event stays as long as the peer has it


def test_whoever_waits_for_a_device_holds_no_other_thread_up(cuda: Any) -> None:
    """Three threads wait for a peer's work, which only starts when the main thread says so."""
    stream, pool = cuda.Stream(0), cuda.Pool(0, 16)
    with peer(record_and_finish_later) as (connection, _):
        event = cuda.Event.open(0, connection.recv())
        event.make_wait(stream.handle)
        calls = [event.synchronize, stream.synchronize, pool.close]
        threads = [threading.Thread(target=call, daemon=True) for call in calls]
        for thread in threads:
            thread.start()
        connection.send("finish")
        for thread in threads:
            thread.join()
        assert event.done()
        event.close()
        connection.send("end")


def test_without_peer_access_a_pool_opens_on_its_own_device_only(
    cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with peer(export_and_end) as (connection, _):
        pool_handle, _ = connection.recv()
        monkeypatch.setenv("NODESERVE_FAKE_CUDA_PEERS", "none")
        cuda.fake.reload_environment()
        with pytest.raises(CudaError, match="peer access is not supported between these two dev"):
            cuda.PeerPool(1, pool_handle, 4096)
        cuda.PeerPool(0, pool_handle, 4096).close()
        connection.send("end")


def test_nobody_opens_what_is_its_own(cuda: Any) -> None:
    pool, event = cuda.Pool(0, 16), cuda.Event(0, interprocess=True)
    with pytest.raises(CudaError, match="cudaIpcOpenMemHandle: invalid device context"):
        cuda.PeerPool(0, pool.handle(), 16)
    with pytest.raises(CudaError, match="cudaIpcOpenEventHandle: invalid device context"):
        cuda.Event.open(0, event.handle())
