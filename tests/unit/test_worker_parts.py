"""The page pool and the handoff between two pools of one process."""

import contextlib
import gc
import mmap
import os
from collections.abc import Iterator

import pytest

from nodeserve.errors import ConfigError, HandoffFailed
from nodeserve.wire.messages import pack_ids
from nodeserve.worker import handoff
from nodeserve.worker.contract import Landed, Ticket
from nodeserve.worker.device import uncollected
from nodeserve.worker.handoff import HostTransfer
from nodeserve.worker.pages import make_pool, map_peer, num_blocks_in
from tests.fakes.pages import whole_blocks

BLOCK_BYTES = 4096


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("pages")
    yield made
    os.close(made)


def test_a_pool_is_shared_zeroed_and_reserved(fd: int) -> None:
    pool = make_pool(fd, 8 * BLOCK_BYTES)
    assert bytes(pool) == bytes(8 * BLOCK_BYTES)
    assert os.fstat(fd).st_blocks * 512 >= 8 * BLOCK_BYTES
    peer = map_peer(fd, 8 * BLOCK_BYTES)
    pool[5000:5003] = b"abc"
    assert peer[5000:5003] == b"abc"
    with pytest.raises(TypeError):
        peer[0] = 1


def test_a_pool_made_again_by_a_restarted_worker_keeps_its_mappings(fd: int) -> None:
    first = make_pool(fd, 8 * BLOCK_BYTES)
    second = make_pool(fd, 8 * BLOCK_BYTES)
    second[0] = 7
    assert first[0] == 7


def test_too_little_shared_memory_is_an_error_with_advice() -> None:
    with open("/dev/shm/nodeserve-test-room", "w+b") as file:
        os.unlink(file.name)
        with pytest.raises(ConfigError, match=r"--kv-memory.*--shm-size"):
            make_pool(file.fileno(), 1 << 45)
        assert os.fstat(file.fileno()).st_size == 0


def test_kv_memory_below_one_sequence_says_how_much_is_needed() -> None:
    assert num_blocks_in(10 * BLOCK_BYTES + 5, BLOCK_BYTES, least=10) == 10
    with pytest.raises(ConfigError, match=f"give {10 * BLOCK_BYTES} or more"):
        num_blocks_in(10 * BLOCK_BYTES - 1, BLOCK_BYTES, least=10)


def test_a_peer_smaller_than_announced_is_refused(fd: int) -> None:
    make_pool(fd, BLOCK_BYTES)
    with pytest.raises(ConfigError, match="announced"):
        map_peer(fd, 2 * BLOCK_BYTES)


@contextlib.contextmanager
def attached(fd: int) -> Iterator[tuple[HostTransfer, mmap.mmap]]:
    """A transfer into 4 blocks, attached to worker 3's 8 blocks, each full of its number."""
    source = make_pool(fd, 8 * BLOCK_BYTES)
    for block in range(8):
        source[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = bytes([block]) * BLOCK_BYTES
    target = mmap.mmap(-1, 4 * BLOCK_BYTES)
    transfer = HostTransfer(target, BLOCK_BYTES)
    transfer.attach(3, whole_blocks(3, fd, 8 * BLOCK_BYTES, BLOCK_BYTES))
    yield transfer, target


def ticket(request_id: int, source_ids: list[int], target_ids: list[int]) -> Ticket:
    return Ticket(request_id, 3, pack_ids(source_ids), pack_ids(target_ids))


def test_blocks_land_where_the_ticket_says(fd: int) -> None:
    with attached(fd) as (transfer, target):
        transfer.begin(ticket(1, [7, 2], [0, 3]))
        assert transfer.busy
        [landed] = transfer.poll()
        assert isinstance(landed, Landed)
        assert landed.request_id == 1 and landed.num_bytes == 2 * BLOCK_BYTES
        assert [target[block * BLOCK_BYTES] for block in range(4)] == [7, 0, 0, 2]
        assert not transfer.busy and transfer.poll() == []


def test_a_poll_moves_no_more_than_its_share(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff, "BYTES_PER_POLL", 2 * BLOCK_BYTES)
    with attached(fd) as (transfer, _):
        for request_id in range(3):
            transfer.begin(ticket(request_id, [request_id], [request_id]))
        assert [landed.request_id for landed in transfer.poll()] == [0, 1]
        assert [landed.request_id for landed in transfer.poll()] == [2]


def test_a_cancelled_pull_writes_nothing(fd: int) -> None:
    with attached(fd) as (transfer, target):
        transfer.begin(ticket(1, [7], [0]))
        transfer.begin(ticket(2, [6], [1]))
        transfer.cancel(1)
        transfer.cancel(99)
        assert [landed.request_id for landed in transfer.poll()] == [2]
        assert target[0] == 0 and target[BLOCK_BYTES] == 6


@pytest.mark.parametrize(
    "wrong",
    [
        Ticket(1, 4, pack_ids([1]), pack_ids([1])),  # a worker that is not attached
        ticket(1, [8], [1]),
        ticket(1, [-1], [1]),
        ticket(1, [], []),
        ticket(1, [1, 2], [1]),
    ],
)
def test_a_wrong_ticket_is_refused(fd: int, wrong: Ticket) -> None:
    with attached(fd) as (transfer, _), pytest.raises(HandoffFailed):
        transfer.begin(wrong)
    assert not transfer.busy


def test_nothing_is_collected_while_a_device_is_imported() -> None:
    """Also where the import fails, collections go on afterwards."""
    with pytest.raises(ImportError), uncollected():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
