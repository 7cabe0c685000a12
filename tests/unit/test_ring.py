"""The byte ring in one process: layout, limits, damage, and a model to compare it with."""

import mmap
import random
import struct
from collections import deque

import pytest

from nodeserve._host import RING_HEADER_BYTES, Ring
from nodeserve.errors import RecordTooLarge, RingError

MAGIC_AT, HEAD_AT, TAIL_AT = 0, 128, 256
LENGTH_BYTES = 4


def memory_for(capacity: int) -> mmap.mmap:
    return mmap.mmap(-1, RING_HEADER_BYTES + capacity)


def make_ring(capacity: int) -> Ring:
    return Ring(memory_for(capacity), create=True)


def footprint(record: bytes) -> int:
    return (LENGTH_BYTES + len(record) + 7) // 8 * 8


def test_a_new_ring_is_empty() -> None:
    ring = make_ring(256)
    assert (ring.capacity, ring.pending_bytes, ring.free_bytes) == (256, 0, 256)
    assert ring.drain() == []


def test_records_come_out_whole_and_in_order() -> None:
    ring, records = make_ring(256), [b"", b"a", b"12345678", bytes(range(100))]
    assert all(ring.put(record) for record in records)
    assert ring.pending_bytes == sum(map(footprint, records))
    assert ring.drain() == records
    assert ring.pending_bytes == 0


def test_drain_takes_at_most_what_was_asked() -> None:
    ring = make_ring(256)
    assert ring.put_many([b"a", b"b", b"c"]) == 3
    assert ring.drain(0) == []
    assert ring.drain(max_records=2) == [b"a", b"b"]
    assert ring.drain(2) == [b"c"]


def test_the_whole_capacity_holds_one_record() -> None:
    ring = make_ring(64)
    record = bytes(range(ring.max_record_bytes))
    assert len(record) == 64 - LENGTH_BYTES
    for _ in range(3):
        assert ring.put(record)
        assert ring.free_bytes == 0
        assert not ring.put(b"")
        assert ring.drain() == [record]


def test_every_size_wraps_at_every_place() -> None:
    for start in range(0, 64, 8):
        ring = make_ring(64)
        ring.put(bytes(max(0, start - LENGTH_BYTES)))
        ring.drain()
        for size in range(61):
            record = bytes((size + place) % 256 for place in range(size))
            assert ring.put(record)
            assert ring.drain() == [record]


def test_put_many_stops_at_the_first_record_without_room() -> None:
    ring = make_ring(64)
    assert ring.put_many([bytes(20), bytes(20), bytes(20), b""]) == 2
    assert ring.put_many((bytes(12),)) == 1
    assert ring.put_many([]) == 0
    assert ring.free_bytes == 0
    assert list(map(len, ring.drain())) == [20, 20, 12]


def test_records_may_be_any_buffer_but_not_text() -> None:
    ring = make_ring(64)
    assert ring.put_many([bytearray(b"a"), memoryview(b"bc")[1:]]) == 2
    assert ring.drain() == [b"a", b"c"]
    with pytest.raises(TypeError):
        ring.put("text")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        ring.put_many(7)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        ring.put_many([b"whole", None])  # type: ignore[list-item]
    assert ring.drain() == []


def test_a_record_that_can_never_fit_is_refused_and_nothing_written() -> None:
    ring = make_ring(64)
    for call in (ring.put, lambda record: ring.put_many([b"small", record])):
        with pytest.raises(RecordTooLarge, match="61 bytes; the ring takes at most 60"):
            call(bytes(61))
    with pytest.raises(RecordTooLarge):
        ring.arm_producer(61)
    assert ring.pending_bytes == 0


def test_capacity_is_cut_to_whole_words() -> None:
    assert make_ring(71).capacity == 64


@pytest.mark.parametrize("num_bytes", [0, 1, RING_HEADER_BYTES, RING_HEADER_BYTES + 63])
def test_too_little_memory_is_refused(num_bytes: int) -> None:
    memory = mmap.mmap(-1, 4096)
    with pytest.raises(RingError, match="at least"):
        Ring(memoryview(memory)[:num_bytes], create=True)


def test_memory_at_an_odd_place_or_read_only_is_refused() -> None:
    with pytest.raises(RingError, match="aligned"):
        Ring(memoryview(memory_for(256))[8:], create=True)
    with pytest.raises(BufferError):
        Ring(bytes(4096), create=True)


def test_both_ends_see_one_ring() -> None:
    memory = memory_for(256)
    producer, consumer = Ring(memory, create=True), Ring(memory, create=False)
    producer.put(b"hello")
    assert consumer.drain() == [b"hello"]
    assert producer.pending_bytes == 0
    producer.beat()
    producer.beat()
    assert consumer.beats == 2


def test_opening_what_is_no_ring_or_another_size_is_refused() -> None:
    memory = memory_for(256)
    with pytest.raises(RingError, match="no ring"):
        Ring(memory, create=False)
    Ring(memory, create=True)
    with pytest.raises(RingError, match="made for 256 bytes"):
        Ring(memoryview(memory)[:-64], create=False)
    memory[MAGIC_AT] ^= 2
    with pytest.raises(RingError, match="version"):
        Ring(memory, create=False)


def test_an_open_ring_keeps_its_memory_and_a_closed_one_refuses() -> None:
    memory = memory_for(256)
    ring = Ring(memory, create=True)
    with pytest.raises(BufferError):
        memory.close()
    ring.close()
    ring.close()
    memory.close()
    for use in (ring.drain, ring.beat, ring.arm_consumer, lambda: ring.put(b"")):
        with pytest.raises(RingError, match="closed"):
            use()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (HEAD_AT, 8),  # behind tail
        (HEAD_AT, 16 + 64 + 8),  # more than the capacity ahead
        (HEAD_AT, 27),  # no multiple of 8
        (HEAD_AT, 2**64 - 8),
        (TAIL_AT, 64),  # ahead of head
        (TAIL_AT, 17),
    ],
)
def test_damaged_counters_are_an_error_for_both_ends(place: int, value: int) -> None:
    memory = memory_for(64)
    ring = Ring(memory, create=True)
    ring.put(bytes(12))
    ring.drain()
    ring.put(bytes(12))
    struct.pack_into("<Q", memory, place, value)
    uses = (lambda: ring.put(b"x"), lambda: ring.put_many([b"x"]), ring.drain, ring.arm_consumer)
    for use in (*uses, lambda: ring.arm_producer(1), lambda: ring.free_bytes):
        with pytest.raises(RingError, match="damaged"):
            use()
    with pytest.raises(RingError, match="damaged"):
        Ring(memory, create=False)


@pytest.mark.parametrize("length", [13, 60, 2**31, 2**32 - 1])
def test_a_damaged_length_is_an_error_and_takes_nothing_out(length: int) -> None:
    memory = memory_for(64)
    ring = Ring(memory, create=True)
    ring.put_many([b"good", bytes(12)])
    struct.pack_into("<I", memory, RING_HEADER_BYTES + footprint(b"good"), length)
    with pytest.raises(RingError, match="damaged"):
        ring.drain()
    assert ring.drain(1) == [b"good"]


def test_a_sleeping_consumer_is_woken_once() -> None:
    ring = make_ring(64)
    assert not ring.consumer_to_wake()
    assert ring.arm_consumer()
    ring.put(b"a")
    assert ring.consumer_to_wake()
    assert not ring.consumer_to_wake()
    assert not ring.arm_consumer()  # there is a record: do not sleep
    assert not ring.consumer_to_wake()
    ring.drain()
    assert ring.arm_consumer()
    ring.disarm_consumer()
    assert not ring.consumer_to_wake()


def test_a_waiting_producer_is_woken_once() -> None:
    ring = make_ring(64)
    assert not ring.arm_producer(60)  # there is room: do not wait
    assert not ring.producer_to_wake()
    ring.put(bytes(40))
    assert not ring.arm_producer(12)
    assert ring.arm_producer(13)
    ring.drain()
    assert ring.producer_to_wake()
    assert not ring.producer_to_wake()
    ring.put(bytes(60))
    assert ring.arm_producer(0)
    ring.disarm_producer()
    assert not ring.producer_to_wake()


class Model:
    """What the ring promises, without any memory layout."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.records: deque[bytes] = deque()

    @property
    def pending_bytes(self) -> int:
        return sum(map(footprint, self.records))

    def put_many(self, records: list[bytes]) -> int:
        for num_put, record in enumerate(records):
            if self.pending_bytes + footprint(record) > self.capacity:
                return num_put
            self.records.append(record)
        return len(records)

    def drain(self, max_records: int) -> list[bytes]:
        return [self.records.popleft() for _ in range(min(max_records, len(self.records)))]


@pytest.mark.parametrize("seed", range(20))
def test_the_ring_agrees_with_the_model(seed: int) -> None:
    rng = random.Random(seed)
    capacity = 8 * rng.randint(8, 64)
    memory = memory_for(capacity)
    producer, consumer = Ring(memory, create=True), Ring(memory, create=False)
    model = Model(capacity)
    for _ in range(500):
        largest = rng.choice([8, 40, producer.max_record_bytes])
        records = [rng.randbytes(rng.randint(0, largest)) for _ in range(rng.randint(0, 3))]
        assert producer.put_many(records) == model.put_many(records)
        assert producer.put(b"one") == bool(model.put_many([b"one"]))
        assert producer.pending_bytes == consumer.pending_bytes == model.pending_bytes
        max_records = rng.randint(0, 5)
        assert consumer.drain(max_records) == model.drain(max_records)
        assert consumer.free_bytes == capacity - model.pending_bytes
