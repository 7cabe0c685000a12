"""A worker that only moves records: `python -m tests.fakes.ring_worker CHANNEL MODE SEED`.

Its records can be checked alone (checksum) and in a row (number), so a torn, lost, repeated or
swapped one shows.
"""

import json
import random
import struct
import sys
import zlib

from nodeserve.wire.channel import ChannelSpec, WorkerEnd

HELLO = b"hello"
STOP = b"stop"
_HEAD = struct.Struct("<QI")


def make_record(rng: random.Random, number: int, max_bytes: int) -> bytes:
    body = rng.randbytes(rng.randint(0, max_bytes - _HEAD.size))
    return _HEAD.pack(number, zlib.crc32(body, number)) + body


def number_of(record: bytes) -> int:
    """The record's place in the row; fails on one that is not whole."""
    number, checksum = _HEAD.unpack_from(record)
    assert zlib.crc32(memoryview(record)[_HEAD.size :], number) == checksum, "torn record"
    return int(number)


def produce(end: WorkerEnd, rng: random.Random) -> None:
    """Send without end, as fast as there is room."""
    number = 0
    while True:
        assert end.outbox.put(make_record(rng, number, max_bytes=700))
        number += 1


def echo(end: WorkerEnd, rng: random.Random, max_wait_s: float | None) -> None:
    """Send back what comes. With a tiny wait, timeouts and rings cross all the time."""
    while True:
        end.outbox.beat()
        for record in end.inbox.drain():
            if record == STOP:
                return
            assert end.outbox.put(record)
        end.inbox.wait(None if max_wait_s is None else rng.random() * max_wait_s)


def main(channel: str, mode: str, seed: str) -> None:
    rng = random.Random(seed)
    with WorkerEnd(ChannelSpec(**json.loads(channel))) as end:
        end.outbox.put(HELLO)
        if mode == "produce":
            produce(end, rng)
        elif mode == "echo":
            echo(end, rng, max_wait_s=None)
        elif mode == "impatient-echo":
            echo(end, rng, max_wait_s=1e-4)


if __name__ == "__main__":
    main(*sys.argv[1:])
