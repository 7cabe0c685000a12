import random

import pytest

from nodeserve.errors import FrameTooLarge
from nodeserve.wire.frames import FrameReader, frame

PAYLOADS = [b"", b"a", b"\x00" * 4, bytes(range(256)) * 5, b"end"]
STREAM = b"".join(map(frame, PAYLOADS))


def test_a_frame_is_a_little_endian_length_and_the_payload() -> None:
    assert frame(b"abc") == b"\x03\x00\x00\x00abc"
    assert frame(b"") == b"\x00\x00\x00\x00"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 64, len(STREAM)])
def test_any_cut_of_the_stream_gives_the_same_frames(size: int) -> None:
    reader, found = FrameReader(2000), []
    for start in range(0, len(STREAM), size):
        found += reader.feed(STREAM[start : start + size])
    assert found == PAYLOADS
    assert not reader.incomplete


@pytest.mark.parametrize("seed", range(20))
def test_random_cuts(seed: int) -> None:
    rng, reader = random.Random(seed), FrameReader(1 << 16)
    payloads = [rng.randbytes(rng.choice([0, 1, 3, 4, 5, 300])) for _ in range(50)]
    stream, found = b"".join(map(frame, payloads)), []
    while stream:
        size = rng.randint(1, 400)
        found += reader.feed(stream[:size])
        stream = stream[size:]
    assert found == payloads


def test_half_a_frame_is_known_as_such() -> None:
    reader = FrameReader(100)
    assert reader.feed(frame(b"hello")[:-1]) == []
    assert reader.incomplete
    assert reader.feed(b"o") == [b"hello"]
    assert not reader.incomplete


def test_the_limit_is_inclusive_and_checked_before_the_payload_comes() -> None:
    assert FrameReader(5).feed(frame(b"12345")) == [b"12345"]
    with pytest.raises(FrameTooLarge, match="6 bytes is over the limit of 5"):
        FrameReader(5).feed(b"\x06\x00\x00\x00")
    with pytest.raises(FrameTooLarge):
        FrameReader(1 << 30).feed(b"\xff\xff\xff\xff")
