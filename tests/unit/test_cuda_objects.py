"""Pools, host pages, streams and events of `_cuda`, over the fake runtime."""

import gc
import itertools
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from nodeserve.errors import BadArgument, CudaError, NodeServeError
from tests.fakes.cuda import bytes_at

OUT_OF_MEMORY = r"out of memory \(cudaErrorMemoryAllocation\)"


def name_of(value: object) -> str:
    """A case's name: what a function prints differs from process to process."""
    return "call" if callable(value) else str(value)[:50]


@pytest.fixture
def mapping() -> Iterator[tuple[mmap.mmap, int]]:
    """Shared memory of 64 KiB and its address."""
    with mmap.mmap(-1, 64 << 10) as memory:
        array = np.frombuffer(memory, np.uint8)
        yield memory, array.ctypes.data
        del array


# ---- devices


def test_the_devices_that_are_visible_are_counted(
    cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cuda.device_count() == 2
    monkeypatch.setenv("NODESERVE_FAKE_CUDA_DEVICES", "4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1,2")
    cuda.fake.reload_environment()
    assert cuda.device_count() == 3


def test_no_device_is_an_error_in_cudas_words(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cuda.fake.reload_environment()
    with pytest.raises(CudaError, match=r"device.cpp:\d+ cudaGetDeviceCount: no CUDA-capable") as e:
        cuda.device_count()
    assert (e.value.number, e.value.name, e.value.code) == (100, "cudaErrorNoDevice", "cuda")
    with pytest.raises(CudaError, match="no CUDA-capable device"):
        cuda.Pool(0, 16)


@pytest.mark.parametrize(
    ("peers", "reachable"), [("all", {(0, 1), (1, 2), (0, 2)}), ("none", set()), ("1-2", {(1, 2)})]
)
def test_peer_access_is_between_two_devices(
    cuda: Any, monkeypatch: pytest.MonkeyPatch, peers: str, reachable: set[tuple[int, int]]
) -> None:
    monkeypatch.setenv("NODESERVE_FAKE_CUDA_DEVICES", "3")
    monkeypatch.setenv("NODESERVE_FAKE_CUDA_PEERS", peers)
    cuda.fake.reload_environment()
    for device, peer in itertools.product(range(3), repeat=2):
        expected = device == peer or (min(device, peer), max(device, peer)) in reachable
        assert cuda.can_access_peer(device, peer) == expected


def test_memory_is_free_and_total_of_one_device(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODESERVE_FAKE_CUDA_MEMORY_BYTES", str(64 << 20))
    cuda.fake.reload_environment()
    pool = cuda.Pool(1, 10 << 20)
    assert cuda.memory(0) == (64 << 20, 64 << 20)
    assert cuda.memory(1) == (54 << 20, 64 << 20)
    with pytest.raises(CudaError, match=rf"^csrc/kv/pool.cpp:\d+ cudaMalloc: {OUT_OF_MEMORY}$"):
        cuda.Pool(1, 55 << 20)
    pool.close()
    assert cuda.memory(1) == (64 << 20, 64 << 20)


# ---- memory


def test_a_pool_is_zeroed_memory_of_its_size(cuda: Any) -> None:
    pool = cuda.Pool(1, 100_000)
    assert (pool.device, pool.num_bytes, pool.address % 256) == (1, 100_000, 0)
    assert not bytes_at(pool.address, 100_000).any()
    assert len(pool.handle()) == 64
    pool.close()


def test_a_small_pool_shares_its_memory_with_nobody(cuda: Any) -> None:
    before = cuda.memory(0)[0]
    pool = cuda.Pool(0, 16)
    assert before - cuda.memory(0)[0] == 2 << 20
    pool.close()


def test_host_pages_are_pinned_where_they_are(cuda: Any, mapping: tuple[mmap.mmap, int]) -> None:
    memory, address = mapping
    pages = cuda.HostPages(address, 64 << 10)
    assert pages.num_bytes == 64 << 10
    bytes_at(pages.address, 1)[0] = 7
    assert memory[0] == 7
    with pytest.raises(CudaError, match="cudaHostRegister: part or all of the requested memory"):
        cuda.HostPages(address, 64 << 10)
    pages.close()
    cuda.HostPages(address, 64 << 10).close()


def test_memory_is_given_back_by_close_and_by_nobody_twice(
    cuda: Any, mapping: tuple[mmap.mmap, int]
) -> None:
    before = cuda.fake.num_allocations()
    makers: list[Callable[[], Any]] = [
        lambda: cuda.Pool(0, 16),
        lambda: cuda.HostPages(mapping[1], 16),
    ]
    for make in makers:
        thing = make()
        assert cuda.fake.num_allocations() == before + 1
        thing.close()
        thing.close()
        assert cuda.fake.num_allocations() == before
    assert cuda.fake.calls("cudaFree") == cuda.fake.calls("cudaHostUnregister") == 1


def test_dropped_objects_clean_up_and_swallow_what_goes_wrong(
    cuda: Any, mapping: tuple[mmap.mmap, int]
) -> None:
    before = cuda.fake.num_allocations()
    things = [cuda.Pool(0, 16), cuda.HostPages(mapping[1], 16), cuda.Stream(0), cuda.Event(0)]
    del things
    gc.collect()
    assert cuda.fake.num_allocations() == before
    assert cuda.fake.calls("cudaEventDestroy") == 1
    pool = cuda.Pool(0, 16)
    cuda.fake.fail("cudaFree", number=4)  # as when CUDA was shut down first
    del pool
    gc.collect()
    assert cuda.fake.calls("cudaFree") == 2


@pytest.mark.parametrize(
    ("function", "undo"),
    [("cudaMemsetAsync", "cudaFree"), ("cudaHostGetDevicePointer", "cudaHostUnregister")],
)
def test_an_object_that_failed_half_way_leaves_nothing(
    cuda: Any, mapping: tuple[mmap.mmap, int], function: str, undo: str
) -> None:
    before = cuda.fake.num_allocations()
    cuda.fake.fail(function, number=719)
    with pytest.raises(CudaError, match=rf"{function}: unspecified launch failure"):
        cuda.Pool(0, 16) if undo == "cudaFree" else cuda.HostPages(mapping[1], 16)
    assert cuda.fake.num_allocations() == before
    assert cuda.fake.calls(undo) == 1


# ---- order


def test_an_event_is_done_when_its_stream_got_there(cuda: Any) -> None:
    pool, stream, event = cuda.Pool(0, 1024), cuda.Stream(0), cuda.Event(0)
    assert event.done()  # never recorded
    cuda.fake.fill(stream.handle, pool.address, 3, 1024)
    event.record(stream.handle)
    assert not bytes_at(pool.address, 1024).any()
    assert not event.done()
    event.synchronize()
    assert event.done()
    assert (bytes_at(pool.address, 1024) == 3).all()


def test_whoever_asks_often_enough_is_told(cuda: Any) -> None:
    stream, event = cuda.Stream(0), cuda.Event(0)
    event.record(stream.handle)
    assert [event.done() for _ in range(2)] == [False, True]


@pytest.mark.parametrize("waits", [True, False])
def test_a_stream_waits_for_anothers_event(cuda: Any, waits: bool) -> None:
    """And without the wait it runs ahead, so tests that leave one out go red."""
    pool, event = cuda.Pool(0, 1024), cuda.Event(0)
    first, second = cuda.Stream(0), cuda.Stream(0, high_priority=True)
    cuda.fake.fill(first.handle, pool.address, 1, 1024)
    event.record(first.handle)
    if waits:
        event.make_wait(second.handle)
    cuda.fake.fill(second.handle, pool.address, 2, 512)
    second.synchronize()
    first.synchronize()
    assert (bytes_at(pool.address, 512) == (2 if waits else 1)).all()


def test_a_wait_is_for_the_record_made_before_it(cuda: Any) -> None:
    pool, event = cuda.Pool(0, 16), cuda.Event(0)
    first, second = cuda.Stream(0), cuda.Stream(0)
    event.record(first.handle)
    event.make_wait(second.handle)
    cuda.fake.fill(first.handle, pool.address, 1, 16)
    event.record(first.handle)
    second.synchronize()
    assert not bytes_at(pool.address, 16).any()
    assert cuda.fake.num_pending() == 2


def test_work_outlives_its_stream(cuda: Any) -> None:
    pool, stream, event = cuda.Pool(0, 16), cuda.Stream(0), cuda.Event(0)
    cuda.fake.fill(stream.handle, pool.address, 1, 16)
    event.record(stream.handle)
    stream.close()
    event.synchronize()
    assert bytes_at(pool.address, 16).all()


def test_time_between_two_events(cuda: Any) -> None:
    stream = cuda.Stream(0)
    start, end = cuda.Event(0, timed=True), cuda.Event(0, timed=True)
    for event in (start, end):
        event.record(stream.handle)
    with pytest.raises(CudaError, match="cudaEventElapsedTime: device not ready"):
        end.elapsed_ms(start)
    stream.synchronize()
    assert end.elapsed_ms(start) > 0
    assert end.elapsed_ms(start) == -start.elapsed_ms(end)


def test_threads_of_the_runtime_finish_work_by_themselves(
    cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODESERVE_FAKE_CUDA_MODE", "threaded")
    cuda.fake.reload_environment()
    pool, event = cuda.Pool(0, 16), cuda.Event(0)
    first, second = cuda.Stream(0), cuda.Stream(0)
    cuda.fake.fill(first.handle, pool.address, 1, 16)
    event.record(first.handle)
    event.make_wait(second.handle)
    cuda.fake.fill(second.handle, pool.address, 2, 16)
    second.synchronize()
    assert (bytes_at(pool.address, 16) == 2).all()


# ---- what is refused

REFUSED: list[tuple[str, Callable[[Any], object]]] = [
    (r"^device 2 does not exist: this process sees 2 dev", lambda c: c.Pool(2, 16)),
    (r"^device -1 does not exist", lambda c: c.memory(-1)),
    (r"^device 2 does not exist", lambda c: c.can_access_peer(2, 0)),
    (r"^peer 7 does not exist", lambda c: c.can_access_peer(0, 7)),
    (r"^device 9 does not exist", lambda c: c.Stream(9)),
    (r"^device 9 does not exist", lambda c: c.Event(9)),
    (r"^device 9 does not exist", lambda c: c.Event.open(9, bytes(64))),
    (r"^device 9 does not exist", lambda c: c.PeerPool(9, bytes(64), 16)),
    (r"^device 9 does not exist", lambda c: c.HostPages(4096, 16, 9)),
    (r"^num_bytes must be a positive multiple of 16, got 0", lambda c: c.Pool(0, 0)),
    (r"^num_bytes must be .*, got -16", lambda c: c.Pool(0, -16)),
    (r"^num_bytes must be .*, got 24", lambda c: c.Pool(0, 24)),
    (r"^num_bytes must be ", lambda c: c.Pool(0, 2**63 - 16)),
    (r"^num_bytes must be .*, got 8", lambda c: c.PeerPool(0, bytes(64), 8)),
    (r"^num_bytes must be .*, got 8", lambda c: c.HostPages(4096, 8)),
    (r"^handle must have 64 bytes .*, got 63", lambda c: c.PeerPool(0, bytes(63), 16)),
    (r"^handle must have 64 bytes .*, got 65", lambda c: c.Event.open(0, bytes(65))),
    (r"^address must be the start of a mapping .*, got 0", lambda c: c.HostPages(0, 16)),
    (r"^address must be .*, got 4112", lambda c: c.HostPages(4112, 16)),
    (r"^timed must be False", lambda c: c.Event(0, interprocess=True, timed=True)),
    (r"^the event has no handle", lambda c: c.Event(0).handle()),
    (r"^stream must be a cudaStream_t .*, got 3", lambda c: c.Event(0).record(3)),
    (r"^stream must be .*, got 5001", lambda c: c.Event(0).make_wait(5001)),
    (r"^elapsed_ms needs two", lambda c: c.Event(0, timed=True).elapsed_ms(c.Event(0))),
    (r"^elapsed_ms needs two", lambda c: c.Event(0).elapsed_ms(c.Event(0, timed=True))),
]


@pytest.mark.parametrize(("message", "call"), REFUSED, ids=name_of)
def test_bad_arguments_are_named(cuda: Any, message: str, call: Callable[[Any], object]) -> None:
    with pytest.raises(BadArgument, match=message) as caught:
        call(cuda)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, NodeServeError)


WRONG_TYPES: list[Callable[[Any], object]] = [
    lambda c: c.Pool("0", 16),
    lambda c: c.Pool(0, 16.5),
    lambda c: c.PeerPool(0, "x" * 64, 16),
    lambda c: c.Event.open(0, "x" * 64),
    lambda c: c.Event(0, True),
    lambda c: c.Event(0).record(-1),
    lambda c: c.HostPages(-4096, 16),
    lambda c: c.Stream(None),
]


@pytest.mark.parametrize("call", WRONG_TYPES)
def test_wrong_types_are_refused(cuda: Any, call: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError):
        call(cuda)


AFTER_CLOSE: list[tuple[str, str, Callable[[Any], object]]] = [
    ("pool", "address", lambda pool: pool.address),
    ("pool", "handle", lambda pool: pool.handle()),
    ("host pages", "address", lambda pages: pages.address),
    ("stream", "handle", lambda stream: stream.handle),
    ("stream", "synchronize", lambda stream: stream.synchronize()),
    ("event", "record", lambda event: event.record(0)),
    ("event", "make_wait", lambda event: event.make_wait(0)),
    ("event", "done", lambda event: event.done()),
    ("event", "synchronize", lambda event: event.synchronize()),
    ("event", "handle", lambda event: event.handle()),
    ("event", "elapsed_ms", lambda event: event.elapsed_ms(event)),
]


@pytest.mark.parametrize(("kind", "use", "call"), AFTER_CLOSE, ids=name_of)
def test_what_is_closed_is_not_used(
    cuda: Any,
    mapping: tuple[mmap.mmap, int],
    kind: str,
    use: str,
    call: Callable[[Any], object],
) -> None:
    thing = {
        "pool": lambda: cuda.Pool(0, 16),
        "host pages": lambda: cuda.HostPages(mapping[1], 16),
        "stream": lambda: cuda.Stream(0),
        "event": lambda: cuda.Event(0, timed=use == "elapsed_ms", interprocess=use == "handle"),
    }[kind]()
    thing.close()
    with pytest.raises(BadArgument, match=rf"^the {kind} (is|are) closed: "):
        call(thing)
    thing.close()


FAILING: list[tuple[str, Callable[[Any], object]]] = [
    ("cudaGetDeviceCount", lambda c: c.device_count()),
    ("cudaDeviceCanAccessPeer", lambda c: c.can_access_peer(0, 1)),
    ("cudaMemGetInfo", lambda c: c.memory(0)),
    ("cudaGetDevice", lambda c: c.memory(0)),
    ("cudaSetDevice", lambda c: c.memory(1)),
    ("cudaMalloc", lambda c: c.Pool(0, 16)),
    ("cudaStreamSynchronize", lambda c: c.Pool(0, 16)),
    ("cudaFree", lambda c: c.Pool(0, 16).close()),
    ("cudaIpcGetMemHandle", lambda c: c.Pool(0, 16).handle()),
    ("cudaIpcOpenMemHandle", lambda c: c.PeerPool(0, bytes(64), 16)),
    ("cudaHostRegister", lambda c: c.HostPages(4096, 16)),
    ("cudaDeviceGetStreamPriorityRange", lambda c: c.Stream(0)),
    ("cudaStreamCreateWithPriority", lambda c: c.Stream(0)),
    ("cudaStreamSynchronize", lambda c: c.Stream(0).synchronize()),
    ("cudaStreamDestroy", lambda c: c.Stream(0).close()),
    ("cudaEventCreateWithFlags", lambda c: c.Event(0)),
    ("cudaEventRecord", lambda c: c.Event(0).record(0)),
    ("cudaStreamWaitEvent", lambda c: c.Event(0).make_wait(0)),
    ("cudaEventQuery", lambda c: c.Event(0).done()),
    ("cudaEventSynchronize", lambda c: c.Event(0).synchronize()),
    ("cudaIpcGetEventHandle", lambda c: c.Event(0, interprocess=True).handle()),
    ("cudaIpcOpenEventHandle", lambda c: c.Event.open(0, bytes(64))),
    ("cudaEventDestroy", lambda c: c.Event(0).close()),
]


@pytest.mark.parametrize(("function", "call"), FAILING, ids=name_of)
def test_cuda_failures_have_the_place_and_cudas_words(
    cuda: Any, function: str, call: Callable[[Any], object]
) -> None:
    cuda.fake.fail(function, number=2)
    with pytest.raises(
        CudaError, match=rf"^csrc/kv/\w+\.cpp:\d+ {function}: {OUT_OF_MEMORY}$"
    ) as e:
        call(cuda)
    assert (e.value.number, e.value.name) == (2, "cudaErrorMemoryAllocation")
    assert e.type is cuda.CudaError and issubclass(e.type, RuntimeError)


def test_a_handle_of_nothing_is_cudas_error(cuda: Any) -> None:
    with pytest.raises(CudaError, match="cudaIpcOpenMemHandle: invalid argument"):
        cuda.PeerPool(0, bytes(64), 16)
    with pytest.raises(CudaError, match="cudaIpcOpenEventHandle: invalid argument"):
        cuda.Event.open(0, bytes(64))


def test_the_current_device_stays_what_it_was(cuda: Any) -> None:
    """torch keeps its device in the same place."""
    calls: list[Callable[[], object]] = [
        lambda: cuda.Pool(1, 16),
        lambda: cuda.Stream(1),
        lambda: cuda.Event(1),
        lambda: cuda.memory(1),
    ]
    for call in calls:
        call()
        assert cuda.fake.current_device() == 0
    cuda.fake.fail("cudaMalloc")
    with pytest.raises(CudaError):
        cuda.Pool(1, 16)
    assert cuda.fake.current_device() == 0
