"""copy_pages against numpy, over the fake runtime: every byte, and its order."""

import mmap
from typing import Any

import numpy as np
import pytest

from nodeserve.policy.copy_plan import PageGeometry, pulls, shards
from tests.fakes.cuda import bytes_at
from tests.fakes.cuda.copies import METHODS, Copy, Int32, Int64, whole


def random_pairs(rng: np.random.Generator, num_targets: int, num_sources: int, n: int) -> Int32:
    targets = rng.permutation(num_targets)[:n]
    return np.stack([targets, rng.integers(0, num_sources, n)], 1).astype(np.int32)


def random_runs(rng: np.random.Generator, strides: tuple[int, int]) -> Int64:
    """Up to 9 runs that do not meet in the target, in any order."""
    cuts = np.sort(rng.choice(np.arange(strides[0] // 16 + 1), rng.integers(2, 11), replace=False))
    runs = []
    for start, end in zip(cuts, cuts[1:], strict=False):
        num_bytes = 16 * min(end - start, strides[1] // 16)
        source = 16 * rng.integers(0, (strides[1] - num_bytes) // 16 + 1)
        runs.append((16 * start, source, num_bytes))
    return rng.permutation(np.array(runs, np.int64))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(6))
def test_every_run_of_every_pair_arrives_and_nothing_else(
    cuda: Any, seed: int, method: str
) -> None:
    rng = np.random.default_rng(seed)
    num_blocks = (int(rng.integers(3, 20)), int(rng.integers(3, 20)))
    strides = (int(16 * rng.integers(20, 1200)), int(16 * rng.integers(20, 1200)))
    pairs = random_pairs(rng, *num_blocks, n=int(rng.integers(1, num_blocks[0] + 1)))
    copy = Copy(cuda, num_blocks, strides, pairs, random_runs(rng, strides), device=seed % 2)
    assert copy.start(method) == 1
    assert (copy.arrived() == copy.expected()).all()


@pytest.mark.parametrize("num_bytes", [16, 496, 512, 4080, 4096, 4112, 70_000 // 16 * 16])
def test_runs_around_the_size_of_a_tile(cuda: Any, num_bytes: int) -> None:
    pairs = np.array([[0, 1], [2, 0]], np.int32)
    runs = np.array([[16, 32, num_bytes]], np.int64)
    copy = Copy(cuda, (3, 2), (num_bytes + 32, num_bytes + 48), pairs, runs)
    copy.start("kernel")
    assert (copy.arrived() == copy.expected()).all()


@pytest.mark.parametrize(
    ("num_pairs", "num_runs", "launches"),
    [
        (504, 1, 1),
        (505, 1, 1),
        (4086, 1, 1),
        (4087, 1, 2),
        (9, 1022, 1),
        (9, 1023, 2),
        (600, 300, 1),
    ],
)
def test_requests_above_one_launchs_parameters(
    cuda: Any, num_pairs: int, num_runs: int, launches: int
) -> None:
    """4,096 bytes hold 504 pairs and a run, 32,752 hold 4,086; runs take up to half of either."""
    stride = 32 * num_runs
    rng = np.random.default_rng(num_pairs)
    pairs = random_pairs(rng, num_pairs, 7, num_pairs)
    places = 32 * np.arange(num_runs)
    runs = np.stack([places, rng.permutation(places), np.full(num_runs, 16)], 1).astype(np.int64)
    copy = Copy(cuda, (num_pairs, 7), (stride, stride), pairs, runs)
    assert copy.start("kernel") == launches
    assert cuda.fake.calls("cudaLaunchKernel") == launches
    source = bytes_at(copy.source.address, 7 * stride).reshape(7, num_runs, 2, 16)
    arrived = copy.arrived().reshape(num_pairs, num_runs, 2, 16)
    assert (arrived[pairs[:, 0], :, 0] == source[pairs[:, 1]][:, runs[:, 1] // 32, 0]).all()
    assert not arrived[:, :, 1].any()


@pytest.mark.parametrize(
    ("limit", "local", "grid"),
    [(0, False, 2), (0, True, 4), (1, True, 1), (5, False, 5), (100, False, 8)],
)
def test_the_kernel_leaves_multiprocessors_to_others(
    cuda: Any, limit: int, local: bool, grid: int
) -> None:
    """The fake device has 8; the request needs 8 thread blocks of 16 warps for its 128 tiles."""
    stride = 32 << 10
    pairs = np.stack([np.arange(16), np.arange(16)[::-1]], 1).astype(np.int32)
    copy = Copy(cuda, (16, 16), (stride, stride), pairs, whole(stride), local=local)
    copy.start("kernel", max_thread_blocks=limit)
    assert cuda.fake.last_grid() == grid
    assert (copy.arrived() == copy.expected()).all()


def test_auto_takes_the_copy_engines_for_whole_blocks_only(cuda: Any) -> None:
    pairs = np.array([[0, 0]], np.int32)
    for strides, runs, engines in [
        ((64, 64), whole(64), 1),
        ((64, 128), whole(64), 0),
        ((64, 64), whole(32), 0),
        ((64, 64), np.array([[0, 32, 32], [32, 0, 32]]), 0),
    ]:
        before = cuda.fake.calls("cudaMemcpyBatchAsync")
        copy = Copy(cuda, (1, 1), strides, pairs, runs)
        assert copy.start("auto") == 1
        assert cuda.fake.calls("cudaMemcpyBatchAsync") - before == engines
        assert (copy.arrived() == copy.expected()).all()
    assert copy.start("auto", stream=0, runs=whole(64)) == 1  # no batches on the default stream
    assert cuda.fake.calls("cudaMemcpyBatchAsync") == 1


@pytest.mark.parametrize("device", [0, 1])
def test_auto_leaves_the_copy_engines_alone_inside_a_device(cuda: Any, device: int) -> None:
    """Wherever in its pools the blocks begin; pinned memory of the host is somewhere else."""
    pairs = np.array([[0, 1], [1, 0]], np.int32)
    copy = Copy(cuda, (3, 3), (64, 64), pairs, whole(64), device=device, local=True)
    inside = {"target": copy.target.address + 64, "target_bytes": 128}
    inside |= {"source": copy.source.address + 64, "source_bytes": 128}
    assert copy.start("auto", **inside) == 1
    assert cuda.fake.calls("cudaMemcpyBatchAsync") == 0
    source = bytes_at(copy.source.address, 192).reshape(3, 64)
    assert (copy.arrived()[1:] == source[[2, 1]]).all()
    host = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.uint8)
    pages = cuda.HostPages(host.ctypes.data, mmap.PAGESIZE, device)
    copy.start("auto", target=pages.address, target_bytes=mmap.PAGESIZE)
    copy.start("auto", source=pages.address, source_bytes=mmap.PAGESIZE)
    assert cuda.fake.calls("cudaMemcpyBatchAsync") == 2
    pages.close()


def test_neighbours_on_both_sides_are_one_copy(cuda: Any) -> None:
    pairs = np.array([[7, 3], [2, 5], [1, 4], [3, 6], [6, 2], [0, 7], [5, 0]], np.int32)
    copy = Copy(cuda, (8, 8), (64, 64), pairs, whole(64))
    copy.start("batch")
    base = (copy.target.address, copy.source.address)
    segments = [(t - base[0], s - base[1], n) for t, s, n in cuda.fake.last_batch()]
    assert segments == [(0, 448, 64), (64, 256, 192), (320, 0, 64), (384, 128, 128)]
    assert (copy.arrived() == copy.expected()).all()


def test_an_empty_request_is_nothing(cuda: Any) -> None:
    copy = Copy(cuda, (1, 1), (64, 64), np.empty((0, 2), np.int32), whole(64))
    assert [copy.start(method) for method in METHODS] == [0, 0, 0]
    no_runs = np.empty((0, 3), np.int64)
    assert copy.start("kernel", pairs=np.array([[0, 0]], np.int32), runs=no_runs) == 0
    assert cuda.fake.num_pending() == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shapes", [((2, 1), (4, 1)), ((4, 2), (1, 1)), ((8, 1), (2, 2))])
def test_a_plan_between_unequal_shards(
    cuda: Any, shapes: tuple[tuple[int, int], tuple[int, int]], method: str
) -> None:
    """From the geometry over the plan to the bytes: each source pool is pulled once."""
    geometry = PageGeometry(4, 4, block_size=4, head_dim=8, value_bytes=2)
    target, sources = shards(geometry, *shapes[0])[-1], shards(geometry, *shapes[1])
    model = np.random.default_rng(3).integers(0, 256, (3, 4, 2, 4, 64), np.uint8)  # 3 blocks
    ours = cuda.Pool(0, 3 * target.block_bytes)
    stream = cuda.Stream(0)
    pairs = np.array([[2, 0], [0, 1], [1, 2]], np.int32)
    for pull in pulls(target, sources):
        shard = sources[pull.source_index]
        peer = cuda.Pool(1, 3 * shard.block_bytes)
        held = model[:, shard.layers.start : shard.layers.stop, :, shard.kv_heads.start :][
            :, :, :, : len(shard.kv_heads)
        ]
        bytes_at(peer.address, peer.num_bytes)[:] = held.reshape(-1)
        runs = np.array([(r.target, r.source, r.num_bytes) for r in pull.runs], np.int64)
        sides = (ours.address, ours.num_bytes, peer.address, peer.num_bytes)
        strides = {"target_stride": target.block_bytes, "source_stride": shard.block_bytes}
        cuda.copy_pages(*sides, pairs, runs, **strides, stream=stream.handle, method=method)
        stream.synchronize()
    layers, heads = target.layers, target.kv_heads
    wanted = model[:, layers.start : layers.stop, :, heads.start : heads.stop].reshape(3, -1)
    arrived = bytes_at(ours.address, ours.num_bytes).reshape(3, -1)
    assert (arrived[pairs[:, 0]] == wanted[pairs[:, 1]]).all()


@pytest.mark.parametrize("method", METHODS)
def test_pinned_host_memory_on_either_side(cuda: Any, method: str) -> None:
    with mmap.mmap(-1, 8192) as memory:
        host = np.frombuffer(memory, np.uint8)
        host[:] = np.arange(8192) % 251
        pages, pool = cuda.HostPages(host.ctypes.data, 8192), cuda.Pool(0, 8192)
        stream, strides = cuda.Stream(0), {"target_stride": 4096, "source_stride": 4096}
        swap = np.array([[0, 1], [1, 0]], np.int32)
        ways = [(pool.address, pages.address, swap), (pages.address, pool.address, swap[:1])]
        for target, source, pairs in ways:
            cuda.copy_pages(
                *(target, 8192, source, 8192, pairs, whole(4096)),
                **strides,
                stream=stream.handle,
                method=method,
            )
            stream.synchronize()
        original = np.arange(8192) % 251
        assert (bytes_at(pool.address, 8192) == np.roll(original, 4096)).all()
        assert (host[:4096] == original[:4096]).all()  # swapped there and back
        pages.close()
        del host


# ---- order


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_comes_after_earlier_and_before_later_work_of_its_stream(
    cuda: Any, method: str
) -> None:
    copy = Copy(cuda, (1, 1), (4096, 4096), np.array([[0, 0]], np.int32), whole(4096))
    cuda.fake.fill(copy.stream.handle, copy.source.address, 1, 4096)
    copy.start(method)
    cuda.fake.fill(copy.stream.handle, copy.source.address, 2, 4096)
    assert not bytes_at(copy.target.address, 4096).any()  # nobody waited yet
    assert (copy.arrived() == 1).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("waits", [True, False])
def test_a_copy_waits_for_the_event_its_stream_waits_for(
    cuda: Any, method: str, waits: bool
) -> None:
    copy = Copy(cuda, (1, 1), (4096, 4096), np.array([[0, 0]], np.int32), whole(4096))
    compute, written = cuda.Stream(1), cuda.Event(1)
    before = copy.expected()
    cuda.fake.fill(compute.handle, copy.source.address, 9, 4096)
    written.record(compute.handle)
    if waits:
        written.make_wait(copy.stream.handle)
    copy.start(method)
    assert (copy.arrived() == (9 if waits else before)).all()
    compute.synchronize()


def test_buffers_may_change_after_the_call(cuda: Any) -> None:
    copy = Copy(cuda, (4, 4), (64, 64), np.array([[0, 1], [3, 2]], np.int32), whole(64))
    expected = copy.expected()
    for method in METHODS:
        pairs, runs = copy.pairs.copy(), copy.runs.copy()
        copy.start(method, pairs=pairs, runs=runs)
        pairs[:], runs[:] = 0, 16
        assert (copy.arrived() == expected).all()
