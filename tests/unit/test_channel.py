"""Senders, receivers and both ends of a channel, in one process."""

import os
import secrets
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nodeserve.errors import RecordTooLarge, RingError
from nodeserve.wire.channel import SHM, CoordinatorEnd, WorkerEnd, sweep_stale
from nodeserve.wire.ring import FLUSH_RECORDS
from nodeserve.wire.seal import SEAL_BYTES

RING_BYTES = 64
MOST_BYTES = RING_BYTES - 4 - SEAL_BYTES  # of a record: its length and its seal take the rest
Ends = tuple[CoordinatorEnd, WorkerEnd]


def open_worker(coordinator: CoordinatorEnd) -> WorkerEnd:
    """As a worker process would: with descriptors of its own."""
    spec = coordinator.spec
    inbox_fd, outbox_fd, eventfd = map(os.dup, coordinator.inherited_fds)
    return WorkerEnd(replace(spec, inbox_fd=inbox_fd, outbox_fd=outbox_fd, eventfd=eventfd))


@pytest.fixture
def ends() -> Iterator[Ends]:
    node_id = secrets.token_hex(4)
    with (
        CoordinatorEnd(node_id, "w0", RING_BYTES) as coordinator,
        open_worker(coordinator) as worker,
    ):
        yield coordinator, worker


def has_rung(coordinator: CoordinatorEnd) -> bool:
    return bool(select.select([coordinator], [], [], 0)[0])


def names(node_id: str) -> list[str]:
    return [path.name for path in SHM.iterdir() if node_id in path.name]


def test_records_pass_both_ways(ends: Ends) -> None:
    coordinator, worker = ends
    coordinator.inbox.post(b"to worker")
    assert worker.inbox.drain() == [b"to worker"]
    assert worker.outbox.put(b"to coordinator")
    assert coordinator.receive() == [b"to coordinator"]


def test_the_coordinator_is_rung_for_the_first_record_only(ends: Ends) -> None:
    coordinator, worker = ends
    assert not has_rung(coordinator)
    worker.outbox.put(b"1")
    assert has_rung(coordinator)
    coordinator.receive()
    assert not has_rung(coordinator)
    worker.outbox.put(b"2")
    worker.outbox.put(b"3")
    assert has_rung(coordinator)
    assert coordinator.receive() == [b"2", b"3"]
    assert coordinator.receive() == []


def test_what_receive_leaves_rings_again(ends: Ends) -> None:
    coordinator, worker = ends
    for record in (b"1", b"2"):
        worker.outbox.put(record)
    assert coordinator.outbox.receive(max_records=1) == [b"1"]
    assert has_rung(coordinator)
    assert coordinator.outbox.receive(max_records=1) == [b"2"]
    assert not has_rung(coordinator)


def test_a_worker_does_not_sleep_on_a_record_or_past_its_timeout(ends: Ends) -> None:
    coordinator, worker = ends
    assert not worker.inbox.wait(0.0)
    coordinator.inbox.post(b"late")  # nobody sleeps any more: no ring is left behind
    assert worker.inbox.wait(None)
    worker.inbox.drain()
    assert not worker.inbox.wait(0.001)


def test_extra_rings_cost_one_turn(ends: Ends) -> None:
    coordinator, worker = ends
    bell = coordinator.inbox._peer
    for _ in range(3):
        bell.ring()
    assert worker.inbox.wait(None)
    assert not worker.inbox.wait(0.0)


def test_a_wake_from_another_thread_ends_the_wait(ends: Ends) -> None:
    _, worker = ends
    threads = [threading.Thread(target=worker.inbox.wake) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert worker.inbox.wait(None) is True
    for thread in threads:
        thread.join()
    worker.inbox.wait(0)  # they came in any order
    worker.inbox.wait(0)
    assert worker.inbox.wait(0) is False


def test_a_wake_is_kept_for_the_next_wait_when_a_put_took_its_ring(ends: Ends) -> None:
    _, worker = ends
    while worker.outbox.try_put(b"x" * 8):
        pass
    worker.inbox.wake()
    assert worker.outbox.put(b"x" * 8, timeout_s=0.01) is False
    assert worker.inbox.wait(None) is True
    assert worker.inbox.wait(0) is False


def test_a_worker_that_finds_no_room_gives_up_in_time_and_loses_nothing(ends: Ends) -> None:
    coordinator, worker = ends
    assert worker.outbox.put(bytes(MOST_BYTES))
    assert not worker.outbox.try_put(b"x")
    assert not worker.outbox.put(b"x", timeout_s=0.001)
    assert coordinator.receive() == [bytes(MOST_BYTES)]
    assert worker.outbox.put(b"x", timeout_s=0.0)
    assert coordinator.receive() == [b"x"]


def test_what_has_no_room_is_posted_in_order_later(ends: Ends) -> None:
    coordinator, worker = ends
    sent = [bytes([n % 256]) * (n % 50) for n in range(3 * FLUSH_RECORDS)]
    for record in sent:
        coordinator.inbox.post(record)
    assert coordinator.inbox.num_queued > 0
    received = []
    while records := worker.inbox.drain():
        received += records
        if coordinator.inbox.num_queued:
            assert has_rung(coordinator)  # for room: it had announced that it waits
        assert coordinator.receive() == []
    assert received == sent


def test_waits_for_room_are_counted_once_each_on_both_ways(ends: Ends) -> None:
    coordinator, worker = ends
    coordinator.inbox.post(bytes(MOST_BYTES))
    assert (coordinator.inbox.num_stalls, coordinator.outbox.num_stalls) == (0, 0)
    assert coordinator.inbox.pending_bytes >= MOST_BYTES
    for _ in range(3):
        coordinator.inbox.post(b"waits")
    assert coordinator.inbox.num_stalls == 1 and coordinator.inbox.num_queued == 3
    worker.inbox.drain()
    coordinator.receive()
    assert coordinator.inbox.num_queued == 0 < coordinator.inbox.pending_bytes
    coordinator.inbox.post(bytes(MOST_BYTES))
    assert coordinator.inbox.num_stalls == 2
    assert worker.outbox.put(bytes(MOST_BYTES))
    assert worker.outbox._ring.arm_producer(8), "as a put does that waits"
    assert coordinator.outbox.pending_bytes >= MOST_BYTES
    coordinator.receive()
    coordinator.receive()
    assert (coordinator.outbox.num_stalls, coordinator.outbox.pending_bytes) == (1, 0)


def test_a_worker_is_rung_for_what_was_queued(ends: Ends) -> None:
    coordinator, worker = ends
    coordinator.inbox.post(bytes(MOST_BYTES))
    coordinator.inbox.post(b"queued")
    worker.inbox.drain()
    assert not worker.inbox.wait(0.0)
    assert worker.inbox._ring.arm_consumer()
    coordinator.receive()
    assert worker.inbox._own.wait(0.0)
    assert worker.inbox.drain() == [b"queued"]


def test_a_post_that_can_never_pass_is_refused_even_behind_others(ends: Ends) -> None:
    coordinator, _ = ends
    for _ in range(2):
        with pytest.raises(RecordTooLarge):
            coordinator.inbox.post(bytes(MOST_BYTES + 1))
        coordinator.inbox.post(bytes(MOST_BYTES))


def test_a_worker_that_never_reads_is_an_error_not_endless_memory(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator, worker = ends
    monkeypatch.setattr(coordinator.inbox, "_max_queued", 3)
    for number in range(4):
        coordinator.inbox.post(bytes([number]) * MOST_BYTES)
    with pytest.raises(RingError, match="3 records unread"):
        coordinator.inbox.post(b"one more")
    assert worker.inbox.drain() == [bytes(MOST_BYTES)]


def overwrite(coordinator: CoordinatorEnd, fd: int, at: int) -> None:
    """One wrong bit in a ring's memory, `at` bytes from its end."""
    place = os.fstat(fd).st_size - at
    (value,) = os.pread(fd, 1, place)
    os.pwrite(fd, bytes([value ^ 1]), place)


@pytest.mark.parametrize("at", [RING_BYTES - 4, RING_BYTES - 4 - 20, 8, 4])
def test_a_record_that_was_written_over_is_an_error_and_so_is_all_behind_it(
    ends: Ends, at: int
) -> None:
    coordinator, worker = ends
    assert worker.outbox.put(bytes(MOST_BYTES - 3))
    overwrite(coordinator, coordinator.spec.outbox_fd, at)
    with pytest.raises(RingError, match="record 0 of"):
        coordinator.receive()
    assert worker.outbox.put(b"good again")
    with pytest.raises(RingError, match="out of order"):
        coordinator.receive()
    coordinator.inbox.post(b"the other way")
    assert worker.inbox.drain() == [b"the other way"]


def test_a_record_that_is_missing_or_came_twice_is_an_error(ends: Ends) -> None:
    coordinator, worker = ends
    coordinator.inbox.post(b"1")
    worker.inbox._ring.drain()
    coordinator.inbox.post(b"2")
    with pytest.raises(RingError, match="out of order"):
        worker.inbox.drain()
    worker.outbox.put(b"1")
    worker.outbox._num_sealed = 0
    worker.outbox.put(b"1")
    with pytest.raises(RingError, match="record 1 of 5 bytes"):
        coordinator.receive()


def test_beats_are_seen(ends: Ends) -> None:
    coordinator, worker = ends
    for _ in range(3):
        worker.outbox.beat()
    assert coordinator.outbox.beats == 3


def test_nothing_is_left_of_a_channel() -> None:
    node_id, num_fds = secrets.token_hex(4), len(os.listdir("/proc/self/fd"))
    with CoordinatorEnd(node_id, "w0") as coordinator:
        assert len(names(node_id)) == 1  # the semaphore, until the worker has opened it
        with open_worker(coordinator) as worker:
            coordinator.unlink_names()
            coordinator.unlink_names()
            assert names(node_id) == []
            coordinator.inbox.post(b"still works")
            assert worker.inbox.drain() == [b"still works"]
    coordinator.close()
    assert len(os.listdir("/proc/self/fd")) == num_fds


def test_a_channel_whose_worker_never_came_leaves_no_name() -> None:
    node_id = secrets.token_hex(4)
    CoordinatorEnd(node_id, "w0").close()
    assert names(node_id) == []


def test_a_worker_that_comes_too_late_is_told(ends: Ends) -> None:
    coordinator, _ = ends
    coordinator.unlink_names()
    with pytest.raises(RingError, match="cannot open the doorbell"):
        open_worker(coordinator)


def test_a_ring_that_does_not_fit_in_shared_memory_is_an_error() -> None:
    node_id, num_fds = secrets.token_hex(4), len(os.listdir("/proc/self/fd"))
    with pytest.raises(RingError, match="bytes of /dev/shm for a ring"):
        CoordinatorEnd(node_id, "w0", ring_bytes=1 << 45)
    assert names(node_id) == []
    assert len(os.listdir("/proc/self/fd")) == num_fds


def test_only_what_dead_coordinators_left_is_swept(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    dead, alive = int(gone.stdout), os.getpid()
    stale = [f"nodeserve-{dead}-0af3-w0-inbox", f"sem.nodeserve-{dead}-0af3-w0-bell"]
    kept = [
        f"nodeserve-{alive}-0af3-w0-inbox",
        "nodeserve-1-0af3-w0-inbox",
        f"other-{dead}-0af3-w0",
        f"nodeserve-{dead}-xyz-w0",
        "nodeserve",
    ]
    for name in (*stale, *kept):
        (tmp_path / name).touch()
    assert sweep_stale(tmp_path) == sorted(stale)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
