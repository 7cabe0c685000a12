"""Graph sizes, pool sizes and routes: tables."""

from dataclasses import replace

import pytest

from nodeserve.errors import ConfigError, HandoffFailed
from nodeserve.worker.routes import Route, choose_route, pack_handle, unpack_handle
from nodeserve.worker.sizing import (
    CONTEXT_BYTES,
    GRAPH_BYTES,
    MAX_SEGMENT_BYTES,
    RESERVE_BYTES,
    GpuMemory,
    Wanted,
    bucket_for,
    graph_sizes,
    num_blocks_for,
    num_slots_for,
)

GIB = 1 << 30
BLOCK = 2 << 20


@pytest.mark.parametrize(
    ("max_num_seqs", "expected"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (4, (1, 2, 4)),
        (7, (1, 2, 4, 7)),
        (8, (1, 2, 4, 8)),
        (9, (1, 2, 4, 8, 9)),
        (40, (1, 2, 4, 8, 16, 24, 32, 40)),
    ],
)
def test_graph_sizes(max_num_seqs: int, expected: tuple[int, ...]) -> None:
    assert graph_sizes(max_num_seqs) == expected


def test_large_batches_have_few_graphs_and_little_waste() -> None:
    sizes = graph_sizes(5000)
    assert sizes[-1] == 512 and len(sizes) <= 52
    assert list(sizes) == sorted(set(sizes))
    for count in range(1, 513):
        bucket = bucket_for(count, sizes)
        assert bucket is not None and count <= bucket <= max(count + 15, 2 * count - 1)
    assert bucket_for(513, sizes) is None
    assert bucket_for(1, ()) is None


WANTED = Wanted(BLOCK, 100, 16, 10, 1, 0.9, None)
EMPTY = GpuMemory(total=100 * GIB, free=80 * GIB, own=20 * GIB)
ASIDE = RESERVE_BYTES + 10 * GRAPH_BYTES


@pytest.mark.parametrize(
    ("memory", "changes", "room"),
    [
        (EMPTY, {}, 70 * GIB),  # 90 of 100, 20 are taken
        (EMPTY, {"utilization": 1.0}, 80 * GIB),
        (replace(EMPTY, free=30 * GIB), {}, 20 * GIB),  # others have 50: theirs
        (EMPTY, {"share": 2}, 25 * GIB),  # 45 for each, 20 are its own
        (replace(EMPTY, free=10 * GIB), {"share": 2}, 10 * GIB),  # and no more than there is
        (EMPTY, {"num_graphs": 0}, 70 * GIB + 10 * GRAPH_BYTES),
    ],
)
def test_the_pool_takes_the_rest_of_the_share(
    memory: GpuMemory, changes: dict[str, object], room: int
) -> None:
    wanted = replace(WANTED, **changes)  # type: ignore[arg-type]
    num_blocks = num_blocks_for(memory, wanted)
    pool_bytes = (num_blocks + 1) * BLOCK  # with the block that belongs to nobody
    assert pool_bytes <= room - ASIDE < pool_bytes + BLOCK


def test_a_given_size_is_taken_as_it_is() -> None:
    wanted = replace(WANTED, kv_memory=150 * BLOCK + 7, utilization=0.1)
    assert num_blocks_for(EMPTY, wanted) == 150
    tight = replace(EMPTY, free=151 * BLOCK + ASIDE)
    assert num_blocks_for(tight, wanted) == 150
    with pytest.raises(
        ConfigError, match=f"--kv-memory .* the {151 * BLOCK - 1} bytes .*: lower it"
    ):
        num_blocks_for(replace(tight, free=tight.free - 1), wanted)
    with pytest.raises(ConfigError, match=rf"raise --kv-memory to {100 * BLOCK} or more"):
        num_blocks_for(EMPTY, replace(wanted, kv_memory=99 * BLOCK))


@pytest.mark.parametrize(
    ("free", "share", "words"),
    [
        (
            10 * GIB + ASIDE + 61 * BLOCK,
            1,
            [
                "60 blocks are left",
                f"{40 * BLOCK} bytes are missing",
                "--max-model-len to 960",
                "above 0.9",
            ],
        ),
        (5 * GIB, 1, [" 0 blocks are left", "--max-num-batched-tokens", "above 0.9"]),
        (10 * GIB + ASIDE, 2, ["fewer workers"]),
    ],
)
def test_too_little_memory_says_what_is_missing_and_what_helps(
    free: int, share: int, words: list[str]
) -> None:
    own = 45 * GIB if share == 2 else 20 * GIB
    with pytest.raises(ConfigError) as caught:
        num_blocks_for(GpuMemory(100 * GIB, free, own), replace(WANTED, share=share))
    for word in words:
        assert word in str(caught.value)
    assert ("--max-model-len" in str(caught.value)) == ("960" in str(words))


def test_one_sequence_exactly_fits() -> None:
    memory = GpuMemory(100 * GIB, 10 * GIB + ASIDE + 101 * BLOCK, CONTEXT_BYTES)
    assert num_blocks_for(memory, WANTED) == 100
    with pytest.raises(ConfigError):
        num_blocks_for(replace(memory, free=memory.free - 1), WANTED)


def test_slots_of_the_shared_memory() -> None:
    assert num_slots_for(BLOCK, 10, float("inf"), 8) == MAX_SEGMENT_BYTES // BLOCK
    assert num_slots_for(BLOCK, 10, 100 * BLOCK, 1) == 50
    assert num_slots_for(BLOCK, 10, 5 * BLOCK, 1) == 10  # make_pool says that there is no room
    assert num_slots_for(BLOCK, 4000, float("inf"), 8) == 4000


@pytest.mark.parametrize("num_workers", [2, 3, 8])
def test_workers_that_look_at_the_same_time_all_get_their_slots(num_workers: int) -> None:
    each = num_slots_for(BLOCK, 10, 1000 * BLOCK, num_workers)
    assert each * num_workers < 1000


@pytest.mark.parametrize(
    ("wish", "gpus", "readers", "obstacle", "expected"),
    [
        ("auto", [0], [], None, Route("ipc", "CUDA IPC")),
        ("auto", [2, 0, 1], [True, True], None, Route("ipc", "CUDA IPC")),
        ("ipc", [2, 0], [True], None, Route("ipc", "CUDA IPC")),
        ("host", [2, 0], [True], None, Route("host", "pinned host memory")),
        ("host", [2, 0], [False], "it cannot", Route("host", "pinned host memory")),
        (
            "auto",
            [2, 0, 1, 3],
            [False, True, False],
            None,
            Route("host", "pinned host memory: GPUs 0, 3 cannot read GPU 2"),
        ),
        (
            "auto",
            [0, 3],
            [False],
            None,
            Route("host", "pinned host memory: GPU 3 cannot read GPU 0"),
        ),
        ("auto", [0], [], "no handles here", Route("host", "pinned host memory: no handles here")),
    ],
)
def test_routes(
    wish: str, gpus: list[int], readers: list[bool], obstacle: str | None, expected: Route
) -> None:
    assert choose_route(wish, gpus, readers, obstacle) == expected


def test_a_route_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="--handoff ipc: GPU 3 cannot read GPU 0; use"):
        choose_route("ipc", [0, 3], [False])


def test_handles_travel_as_one() -> None:
    packed = pack_handle(b"m" * 64, b"e" * 64)
    assert unpack_handle(packed) == (b"m" * 64, b"e" * 64)
    with pytest.raises(HandoffFailed, match="127 bytes"):
        unpack_handle(packed[1:])
