"""The GPU transfer in one process over the fake CUDA runtime: copies that have not run yet, slots
that run out, cancels at every moment, errors of CUDA."""

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from nodeserve.config import WorkerSpec
from nodeserve.errors import ConfigError, CudaError, HandoffFailed
from nodeserve.wire.messages import pack_ids, unpack_ids
from nodeserve.worker import transfer_setup
from nodeserve.worker.contract import CopyFailed, Landed, Offered, Source, Ticket
from nodeserve.worker.offers import DirectOffers
from nodeserve.worker.transfer_cuda import CudaTransfer
from nodeserve.worker.transfer_setup import make_transfer
from tests.fakes.cuda import bytes_at
from tests.fakes.harness import default_spec
from tests.fakes.pages import whole_blocks
from tests.patience import PATIENCE_S

BLOCK_BYTES, NUM_BLOCKS = 256, 12


class Edge:
    """As much of a runtime as a transfer needs."""

    index = 0

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda

    def thread_begins(self) -> None:
        pass


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("pages")
    yield made
    os.close(made)


def numbered(cuda: Any, first: int = 0) -> Any:
    """A pool whose blocks are full of their number, counted from `first`."""
    pool = cuda.Pool(0, NUM_BLOCKS * BLOCK_BYTES)
    view = np.frombuffer(bytes_at(pool.address, pool.num_bytes), np.uint8)
    view.reshape(NUM_BLOCKS, -1)[:] = np.arange(first, first + NUM_BLOCKS)[:, None]
    return pool


def blocks_of(pool: Any) -> list[int]:
    view = np.frombuffer(bytes_at(pool.address, pool.num_bytes), np.uint8)
    rows = view.reshape(NUM_BLOCKS, -1)
    assert (rows == rows[:, :1]).all(), "a block was copied in part"
    return [int(number) for number in rows[:, 0]]


def alone(name: str, value: int) -> int:
    """What a team of one worker agrees on."""
    return value


def pages_of(owner: CudaTransfer, fd: int) -> tuple[Source, ...]:
    return whole_blocks(0, fd, owner.pages_bytes, BLOCK_BYTES, owner.pages_handle)


def spec_of(fd: int, **changes: Any) -> WorkerSpec:
    values: dict[str, Any] = {"pages_fd": fd, "gpus": (0,), "role": "prefill", "max_model_len": 64}
    return default_spec(**{**values, **changes})


class Pair:
    """A prefill worker whose pages go through host memory with `num_slots` blocks, and a decode
    worker attached to it; their pools and what `poll` said."""

    def __init__(self, cuda: Any, fd: int, monkeypatch: pytest.MonkeyPatch, num_slots: int) -> None:
        monkeypatch.setattr(transfer_setup, "num_slots_for", lambda *_: num_slots)
        edge: Any = Edge(cuda)
        self.cuda = cuda
        self.source_pool, self.target_pool = numbered(cuda), numbered(cuda, 100)
        self.source, route = make_transfer(
            spec_of(fd, handoff="host"), edge, self.source_pool, BLOCK_BYTES, alone
        )
        assert route.description == "pinned host memory"
        self.target, _ = make_transfer(
            spec_of(fd, role="decode"), edge, self.target_pool, BLOCK_BYTES, alone
        )
        self.woken = threading.Semaphore(0)
        self.target.attach(0, pages_of(self.source, fd))

    def watch(self) -> None:
        """From now on copies end by themselves, as somebody waits for them."""
        self.source.on_done(self.woken.release)
        self.target.on_done(self.woken.release)

    def offered(self, *request_ids: int) -> dict[int, list[int]]:
        """The slots of these offers, once they are there."""
        found: dict[int, list[int]] = {}
        while set(found) != set(request_ids):
            for moved in self.source.poll():
                assert isinstance(moved, Offered)
                found[moved.request_id] = unpack_ids(moved.block_ids).tolist()
            if set(found) != set(request_ids):
                assert self.woken.acquire(timeout=PATIENCE_S)
        return found

    def landed(self, *request_ids: int) -> list[Landed]:
        found: list[Landed] = []
        while len(found) < len(request_ids):
            for moved in self.target.poll():
                assert isinstance(moved, Landed)
                found.append(moved)
            if len(found) < len(request_ids):
                assert self.woken.acquire(timeout=PATIENCE_S)
        assert [one.request_id for one in found] == list(request_ids)
        return found

    def pull(self, request_id: int, source_ids: list[int], target_ids: list[int]) -> None:
        self.target.begin(Ticket(request_id, 0, pack_ids(source_ids), pack_ids(target_ids)))


MakePair = Callable[[int], Pair]


@pytest.fixture
def pair(cuda: Any, fd: int, monkeypatch: pytest.MonkeyPatch) -> MakePair:
    return lambda num_slots: Pair(cuda, fd, monkeypatch, num_slots)


def test_pages_go_out_into_slots_and_in_where_the_ticket_says(pair: MakePair) -> None:
    both = pair(8)
    both.watch()
    assert both.source.offer(1, pack_ids([7, 2, 5])) is None
    assert both.source.offer(2, pack_ids([3])) is None
    slots = both.offered(1, 2)
    both.pull(1, slots[1], [0, 11, 4])
    both.pull(2, slots[2], [1])
    first, second = both.landed(1, 2)
    assert (first.num_bytes, second.num_bytes) == (3 * BLOCK_BYTES, BLOCK_BYTES)
    assert first.seconds >= 0.0
    expected = list(range(100, 112))
    expected[0], expected[11], expected[4], expected[1] = 7, 2, 5, 3
    assert blocks_of(both.target_pool) == expected
    assert not both.source.busy and not both.target.busy


def test_nothing_is_said_before_the_copy_ran(pair: MakePair) -> None:
    both = pair(8)
    assert both.source.offer(1, pack_ids([7])) is None
    assert both.source.poll() == []
    both.watch()
    assert both.source.offer(2, pack_ids([6])) is None  # behind it on the same stream
    assert set(both.offered(1, 2)) == {1, 2}


def test_offers_wait_for_slots_in_their_order(pair: MakePair) -> None:
    both = pair(4)
    both.watch()
    for request_id, blocks in ((1, [1, 2, 3]), (2, [4, 5]), (3, [6])):
        assert both.source.offer(request_id, pack_ids(blocks)) is None
    assert len(both.offered(1)[1]) == 3
    assert both.source.poll() == []  # 3 would fit, but 2 came first
    both.source.withdraw(1)
    slots = both.offered(2, 3)
    assert not set(slots[2]) & set(slots[3])
    both.pull(9, [*slots[2], *slots[3]], [0, 1, 2])
    both.landed(9)
    assert blocks_of(both.target_pool)[:3] == [4, 5, 6]


@pytest.mark.parametrize("moment", ["queued", "copying", "offered"])
@pytest.mark.parametrize("how", ["cancel", "withdraw"])
def test_an_offer_can_end_at_every_moment(pair: MakePair, moment: str, how: str) -> None:
    """Its slots go to the next one, and its copy writes there no more."""
    both = pair(3)
    if moment == "queued":
        both.source.offer(1, pack_ids([8, 9]))
    both.source.offer(2, pack_ids([1, 2]))
    if moment == "offered":
        both.watch()
        both.source.offer(3, pack_ids([0]))
        both.offered(2, 3)
        both.source.withdraw(3)
    getattr(both.source, how)(2)
    getattr(both.source, how)(2)  # once more is no mistake
    both.watch()
    if moment == "queued":
        both.source.offer(4, pack_ids([5]))
        slots = both.offered(1, 4)
        assert len({*slots[1], *slots[4]}) == 3
        both.pull(9, [*slots[1], *slots[4]], [0, 1, 2])
        both.landed(9)
        assert blocks_of(both.target_pool)[:3] == [8, 9, 5]
        return
    both.source.offer(4, pack_ids([3, 4, 5]))  # needs all slots
    both.pull(9, both.offered(4)[4], [0, 1, 2])
    both.landed(9)
    assert blocks_of(both.target_pool)[:3] == [3, 4, 5]


def test_a_cancelled_pull_is_over_when_cancel_returns(pair: MakePair, cuda: Any) -> None:
    both = pair(4)
    both.source.on_done(both.woken.release)
    both.source.offer(1, pack_ids([7, 8]))
    slots = both.offered(1)[1]
    both.pull(1, slots, [0, 1])
    assert blocks_of(both.target_pool)[:2] == [100, 101]
    both.target.cancel(1)
    assert blocks_of(both.target_pool)[:2] == [7, 8]  # from now on nobody writes there
    both.target.cancel(99)
    both.target.on_done(both.woken.release)
    both.pull(2, slots, [2, 3])
    both.landed(2)
    assert blocks_of(both.target_pool)[2:4] == [7, 8]


def test_a_peer_attached_again_is_read_where_it_is_now(pair: MakePair, fd: int) -> None:
    both = pair(4)
    both.watch()
    both.source.offer(1, pack_ids([7]))
    slots = both.offered(1)[1]
    both.pull(1, slots, [0])
    both.target.attach(0, pages_of(both.source, fd))
    both.pull(2, slots, [1])
    both.landed(1, 2)
    assert blocks_of(both.target_pool)[:2] == [7, 7]


def test_pulls_from_a_peer_that_ended_are_over_when_detach_returns(pair: MakePair, fd: int) -> None:
    both = pair(4)
    both.watch()
    both.source.offer(1, pack_ids([7]))
    slots = both.offered(1)[1]
    both.pull(1, slots, [0])
    both.landed(1)
    both.pull(2, slots, [1])
    assert both.target.detach(0) == [2] and both.target.detach(0) == []
    assert both.target.poll() == []
    with pytest.raises(HandoffFailed, match="not attached"):
        both.pull(3, slots, [2])
    both.target.attach(0, pages_of(both.source, fd))
    both.pull(4, slots, [3])
    both.landed(4)
    assert blocks_of(both.target_pool)[3] == 7


# ---- errors


@pytest.mark.parametrize(
    ("source", "source_ids", "target_ids", "words"),
    [
        (4, [0], [0], "worker 4 are not attached"),
        (0, [99], [0], "has blocks 0 to"),
        (0, [-1], [0], "has blocks 0 to"),
        (0, [], [], "has blocks 0 to"),
        (0, [0, 1], [0], "takes 1 blocks, worker 0 offers 2"),
    ],
)
def test_a_wrong_ticket_is_refused(
    pair: MakePair, source: int, source_ids: list[int], target_ids: list[int], words: str
) -> None:
    both = pair(4)
    with pytest.raises(HandoffFailed, match=words):
        both.target.begin(Ticket(1, source, pack_ids(source_ids), pack_ids(target_ids)))
    assert both.target.poll() == []
    assert blocks_of(both.target_pool) == list(range(100, 112))


def test_a_pull_that_cannot_begin_fails_alone(pair: MakePair, cuda: Any) -> None:
    both = pair(4)
    both.watch()
    both.source.offer(1, pack_ids([7]))
    slots = both.offered(1)[1]
    cuda.fake.fail("cudaEventRecord", 2)
    with pytest.raises(HandoffFailed, match=r"cannot be copied: .*cudaEventRecord"):
        both.pull(1, slots, [0])
    both.pull(2, slots, [1])
    both.landed(2)
    assert blocks_of(both.target_pool)[1] == 7


def test_a_pull_that_breaks_fails_alone(pair: MakePair, cuda: Any) -> None:
    both = pair(4)
    both.watch()
    both.source.offer(1, pack_ids([7]))
    slots = both.offered(1)[1]
    both.pull(1, slots, [0])
    both.pull(2, slots, [1])
    cuda.fake.fail("cudaEventQuery")
    moved = both.target.poll()
    assert isinstance(moved[0], CopyFailed) and moved[0].request_id == 1
    assert isinstance(moved[0].problem, HandoffFailed)
    assert [one.request_id for one in moved[1:]] == [2]  # its copy was waited for


def test_a_device_that_works_no_more_takes_the_worker_along(pair: MakePair, cuda: Any) -> None:
    both = pair(4)
    both.watch()
    both.source.offer(1, pack_ids([7]))
    slots = both.offered(1)[1]
    cuda.fake.fail("cudaEventRecord")
    cuda.fake.fail("cudaStreamSynchronize", 1, 700)
    with pytest.raises(CudaError, match="illegal memory access"):
        both.pull(1, slots, [0])


def test_an_offer_that_cannot_begin_fails_alone(pair: MakePair, cuda: Any) -> None:
    both = pair(2)
    both.watch()
    cuda.fake.fail("cudaEventRecord")
    assert both.source.offer(1, pack_ids([7, 8])) is None
    assert both.source.busy  # nothing else would wake the loop
    [moved] = both.source.poll()
    assert isinstance(moved, CopyFailed) and moved.request_id == 1
    both.source.withdraw(1)  # the coordinator's cancel may follow
    both.source.offer(2, pack_ids([3, 4]))
    assert sorted(both.offered(2)[2]) == [0, 1]


# ---- routes


def test_a_pool_that_can_be_read_is_offered_as_it_is(cuda: Any, fd: int) -> None:
    pool = numbered(cuda)
    edge: Any = Edge(cuda)
    transfer, route = make_transfer(spec_of(fd, gpus=(0, 1)), edge, pool, BLOCK_BYTES, alone)
    assert route.description == "CUDA IPC"
    assert transfer.pages_bytes == pool.num_bytes and len(transfer.pages_handle) == 128
    assert transfer.offer(1, pack_ids([3, 4])) == pack_ids([3, 4])
    assert os.fstat(fd).st_size == 0  # no shared memory was taken
    transfer.withdraw(1)
    assert transfer.poll() == []


def test_a_gpu_that_exports_nothing_goes_through_the_host(cuda: Any, fd: int) -> None:
    cuda.fake.fail("cudaIpcGetMemHandle", 1, 801)
    edge: Any = Edge(cuda)
    transfer, route = make_transfer(spec_of(fd), edge, numbered(cuda), BLOCK_BYTES, alone)
    assert route.description.startswith("pinned host memory: this GPU's memory cannot be exported")
    assert transfer.pages_handle == b"" and transfer.pages_bytes == os.fstat(fd).st_size > 0


def test_too_little_shared_memory_says_what_it_is_for(
    cuda: Any, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodeserve.worker.pages.free_bytes", lambda fd: 100.0)
    edge: Any = Edge(cuda)
    with pytest.raises(ConfigError, match=r"leave this GPU through shared memory.*--shm-size"):
        make_transfer(spec_of(fd, handoff="host"), edge, numbered(cuda), BLOCK_BYTES, alone)


def test_a_worker_that_does_not_prefill_has_nothing_to_offer(cuda: Any, fd: int) -> None:
    edge: Any = Edge(cuda)
    transfer, route = make_transfer(
        spec_of(fd, role="mixed"), edge, numbered(cuda), BLOCK_BYTES, alone
    )
    assert (transfer.pages_bytes, transfer.pages_handle) == (0, b"")
    assert route.description == "pulls only"
    with pytest.raises(HandoffFailed):
        transfer.offer(1, pack_ids([1]))


def test_a_foreign_handle_is_refused(cuda: Any, fd: int) -> None:
    edge: Any = Edge(cuda)
    transfer, _ = make_transfer(
        spec_of(fd, role="decode"), edge, numbered(cuda), BLOCK_BYTES, alone
    )
    with pytest.raises(HandoffFailed, match="another version"):
        transfer.attach(0, whole_blocks(0, fd, 4096, BLOCK_BYTES, b"x" * 64))


def test_pages_that_cannot_be_opened_end_the_worker_with_advice(cuda: Any, fd: int) -> None:
    edge: Any = Edge(cuda)
    pool = numbered(cuda)
    owner, _ = make_transfer(spec_of(fd), edge, pool, BLOCK_BYTES, alone)
    reader, _ = make_transfer(spec_of(fd, role="decode"), edge, numbered(cuda), BLOCK_BYTES, alone)
    with pytest.raises(ConfigError, match=r"worker 0 cannot be opened .*--handoff host"):
        reader.attach(0, pages_of(owner, fd))  # not in one process
    os.ftruncate(fd, 4096)
    cuda.fake.fail("cudaHostRegister")
    with pytest.raises(ConfigError, match=r"worker 0 cannot be opened .*cudaHostRegister"):
        reader.attach(0, whole_blocks(0, fd, 4096, BLOCK_BYTES))
    with pytest.raises(ConfigError, match="8192 were announced"):
        reader.attach(0, whole_blocks(0, fd, 8192, BLOCK_BYTES))


def test_pages_offered_directly_are_complete_before_anybody_hears_of_them(cuda: Any) -> None:
    """A worker that dies right after must leave no peer waiting for an event."""
    written, stream = cuda.Event(0, interprocess=True), cuda.Stream(0)
    offers = DirectOffers(written, stream, NUM_BLOCKS * BLOCK_BYTES, b"handle")
    written.record(stream.handle)
    assert not written.done(), "here nothing runs that nobody waits for"
    assert offers.offer(1, pack_ids([7])) == pack_ids([7])
    assert written.done()
