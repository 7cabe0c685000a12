"""Bytes that would become too much: refused before memory is taken for them."""

import tracemalloc
from collections.abc import Callable
from typing import Any

import msgpack
import pytest

from nodeserve.errors import FrameTooLarge, ProtocolError
from nodeserve.types import MAX_CONSTRAINT_BYTES, MAX_LISTED
from nodeserve.wire import messages as m
from nodeserve.wire.frames import HEADER, FrameReader
from nodeserve.wire.limits import MAX_EXTENSION_BYTES, OF_A_CLIENT, OF_A_RING, OF_THE_SERVER, Limits
from nodeserve.wire.tagged import SHORT_BYTES, Tagged

LIMITS: dict[str, Limits] = {
    "TO_WORKER": OF_A_RING,
    "FROM_WORKER": OF_A_RING,
    "TO_SERVER": OF_A_CLIENT,
    "TO_CLIENT": OF_THE_SERVER,
}
FRAME_BYTES = 4 << 20


def coder(name: str) -> Tagged[Any]:
    return getattr(m, name)  # type: ignore[no-any-return]


def refused(name: str, data: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        coder(name).decode(data)


def submit(**sampling: Any) -> bytes:
    return m.TO_SERVER.encode(m.Submit(1, m.pack_ids([1]), sampling, None, 0))


def peak_bytes(action: Callable[[], object]) -> int:
    """What the action takes at most, beside what is there already."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def array(count: int, entry: bytes = b"\x00") -> bytes:
    return b"\xdd" + count.to_bytes(4, "big") + entry * count


@pytest.mark.parametrize("name", LIMITS)
def test_one_entry_more_than_the_limit_is_refused(name: str) -> None:
    most = LIMITS[name].max_items
    refused(name, array(most + 1), "max_array_len")
    refused(name, array(most), "unknown message tag|fields, expected")  # read, and no message
    pairs = b"".join(msgpack.packb(key) + b"\x00" for key in range(most + 1))
    refused(name, b"\x91\xdf" + (most + 1).to_bytes(4, "big") + pairs, "max_map_len")


@pytest.mark.parametrize(
    ("name", "empty"),
    [
        *(("TO_SERVER", empty) for empty in (b"\x90", b"\x80")),
        *(
            pytest.param(name, b"\x90", marks=pytest.mark.slow)
            for name in LIMITS
            if name != "TO_SERVER"
        ),
    ],
)
def test_one_container_more_than_the_limit_is_refused(name: str, empty: bytes) -> None:
    """Spread over several lists, since no single one may be so long."""
    limits = LIMITS[name]
    left, parts = limits.max_containers - 1, []
    while left > 0:
        inside = min(left - 1, limits.max_items - 1)
        parts.append(array(inside, empty))
        left -= inside + 1
    whole = b"\xdd" + len(parts).to_bytes(4, "big") + b"".join(parts)
    refused(name, whole, "starts with its tag")
    parts.append(empty)
    whole = b"\xdd" + len(parts).to_bytes(4, "big") + b"".join(parts)
    refused(name, whole, "too many arrays and maps")


@pytest.mark.parametrize("name", LIMITS)
def test_a_text_may_be_as_long_as_the_limit_and_bytes_as_long_as_the_message(name: str) -> None:
    most = LIMITS[name].max_text_bytes
    refused(name, msgpack.packb([0, "x" * most]), "fields, expected|wrong type")
    refused(name, msgpack.packb([0, "x" * (most + 1)]), "max_str_len")
    refused(name, msgpack.packb([0, bytes(most + 1)]), "fields, expected|wrong type")


def test_extension_types_have_no_room() -> None:
    long = msgpack.ExtType(5, bytes(MAX_EXTENSION_BYTES + 1))
    refused("TO_SERVER", msgpack.packb([1, long]), "max_ext_len")
    refused("TO_SERVER", msgpack.packb([1, msgpack.ExtType(5, b"x")]), "request_id has the wrong")


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("depth", [17, 1000, 1_000_000])
def test_depth_is_bounded(name: str, depth: int) -> None:
    refused(name, b"\x91" * depth + b"\x00", "too many|not a msgpack|starts with its tag")


def test_the_largest_lists_that_values_allow_are_well_within() -> None:
    stops = list(range(MAX_LISTED + 1))
    decoded = m.TO_SERVER.decode(submit(stop_token_ids=stops, logit_bias=dict.fromkeys(stops, 0.5)))
    assert isinstance(decoded, m.Submit)
    assert len(decoded.sampling["stop_token_ids"]) == MAX_LISTED + 1


def test_the_largest_constraint_is_well_within() -> None:
    text = "é" * MAX_CONSTRAINT_BYTES  # twice as many bytes: still a matter of its value
    decoded = m.TO_SERVER.decode(submit(constraint={"regex": text}))
    assert isinstance(decoded, m.Submit)
    assert decoded.sampling["constraint"]["regex"] == text


BOMBS = {
    "empty lists": array(FRAME_BYTES - 6, b"\x90"),
    "empty maps": array(FRAME_BYTES - 6, b"\x80"),
    "announced": b"\xdd\xff\xff\xff\xff",
    "announced and nested": b"\xdd\x00\x10\x00\x00" * 1000,
    "an announced map": b"\x91\xdf\xff\xff\xff\xff",
    "announced text": b"\x91\xdb\xff\xff\xff\xff",
    "announced bytes": b"\x91\xc6\xff\xff\xff\xff",
    "lists of lists": array(4096, array(900, b"\x90")),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_a_client_cannot_make_a_message_grow(bomb: bytes) -> None:
    assert len(bomb) <= FRAME_BYTES
    assert peak_bytes(lambda: refused("TO_SERVER", bomb, "not a msgpack message")) < 1 << 20


NESTED = {
    "TO_SERVER": b"\xdc\x10\x00",
    "TO_CLIENT": b"\xdd\x00\x10\x00\x00",
    "TO_WORKER": b"\xdc\xff\xff",
    "FROM_WORKER": b"\xdc\xff\xff",
}


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("num_bytes", [15, SHORT_BYTES, SHORT_BYTES + 1, 3000, 100_000])
def test_lists_within_lists_take_no_memory_for_what_they_announce(
    name: str, num_bytes: int
) -> None:
    """Each header is within the limits; the decoder would take what all of them say at once."""
    bomb = (NESTED[name] * num_bytes)[:num_bytes]
    assert peak_bytes(lambda: refused(name, bomb, "not a msgpack message")) < 1 << 20


def test_what_is_behind_a_long_message_is_refused() -> None:
    data = m.TO_SERVER.encode(m.Submit(1, bytes(4 * SHORT_BYTES), {}, None, 0))
    assert isinstance(m.TO_SERVER.decode(memoryview(data)), m.Submit)
    refused("TO_SERVER", data + b"\x00", "not a msgpack message")
    refused("TO_SERVER", data[:-1], "not a msgpack message")


def test_a_frame_that_claims_four_gigabytes_allocates_nothing() -> None:
    reader = FrameReader(FRAME_BYTES)

    def claim() -> None:
        for data in (HEADER.pack(2**32 - 1), b""):  # it stays refused
            with pytest.raises(FrameTooLarge):
                reader.feed(data)

    assert peak_bytes(claim) < 1 << 16


def test_a_frame_takes_memory_only_as_it_comes() -> None:
    reader = FrameReader(FRAME_BYTES)
    begun = HEADER.pack(FRAME_BYTES) + bytes(1000)
    assert peak_bytes(lambda: reader.feed(begun)) < 1 << 16
    assert reader.incomplete
