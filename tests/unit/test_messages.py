"""Every message of every union: there and back, and nothing but ProtocolError for the rest."""

import random
import typing
from typing import Any

import msgpack
import pytest

from nodeserve.errors import ProtocolError
from nodeserve.wire import messages as m
from nodeserve.wire.limits import OF_A_RING
from nodeserve.wire.tagged import Tagged

IDS = m.pack_ids([1, 2, 70_000])
LOAD = [1, 2, 3, 4, 5, 6]
SAMPLES: dict[str, list[Any]] = {
    "TO_WORKER": [
        m.AttachPages(1, 7, 1 << 40, b"handle", 0, [1, 2, 0, 1]),
        m.Prefill(7, [[2**40, IDS, 3, {"temperature": 0.5, "logit_bias": {5: 1.0}}, True]]),
        m.PullKv(1, 0, IDS, IDS, 2, {}),
        m.ReleaseKv(9),
        m.Cancel(9),
        m.Shutdown(),
        m.Probe(),
        m.DetachPages(3),
        m.Count(3),
        m.CountExperts(4),
    ],
    "FROM_WORKER": [
        m.Mapped(4242),
        m.Loading("weights", 3, 272),
        m.Ready(2912, 737_280, 4, 1 << 31, b"", "native", "shared memory", 1.25),
        m.PagesAttached(1),
        m.StepDone(
            *(m.pack_request_ids([7]), m.pack_ids([5]), b"\x01", None, [], b"", b"", LOAD),
            *(1, 5.5, 0.01, 0, 0.0, 1, 99, b""),
        ),
        m.StepDone(
            *(b"", b"", b"", [[0, -0.5, IDS, b""]], [[7, IDS]], b"", b"", LOAD),
            *(2, 5.6, 0.01, 512, 1e5, 0, 0, m.pack_times([5.25])),
        ),
        m.KvReady(7, IDS),
        m.KvPulled(7, 1 << 20, 0.002),
        m.KvRefused(7, LOAD),
        m.Dropped(7, LOAD),
        m.RequestFailed(7, "internal", "what happened", LOAD),
        m.Failed("bad_model", "what happened"),
        m.Alive(LOAD),
        m.Counted(3, 10, 20, 64, 60, 4, b"", m.pack_request_ids([7]), b"", b"", b"", LOAD, ""),
        m.ExpertsCounted(4, m.pack_ids([1]), m.pack_counts([2**40, 0]), m.pack_counts([1, 2])),
    ],
    "TO_SERVER": [
        m.Submit(0, IDS, {"max_tokens": 5}, {"ttft_ms": 100}, -1),
        m.Submit(2**63, b"", {}, None, 0),
        m.Abort(0),
        m.GetStats(),
        m.Stop(True),
        m.GetHealth(),
        m.GetAudit(),
        m.Trace(True),
        m.GetExperts(),
    ],
    "TO_CLIENT": [
        m.Hello(m.PROTOCOL_VERSION, {"model": "name"}),
        m.Tokens([[0, IDS, None], [1, IDS, [[-0.5, IDS, IDS]]]]),
        m.End(0, "stop", None, "", {"prompt_tokens": 1}, {"prefill_s": 0.5}, None),
        m.End(0, "error", "overloaded", "what happened", {}, {}, 1.5),
        m.Stats({"workers": []}),
        m.Goodbye("protocol", "why"),
        m.Health({"state": "ready"}),
        m.Audit({"problems": []}),
        m.Traced([[1, 0.5, 7, 100, 20, 0], [3, 0.75, 7, 0, 1, 4096, 0.001]], 3, False),
        m.Experts({"model": {}, "ranks": [], "silent": [3]}),
    ],
}
UNIONS: dict[str, Any] = {
    "TO_WORKER": m.ToWorker,
    "FROM_WORKER": m.FromWorker,
    "TO_SERVER": m.ToServer,
    "TO_CLIENT": m.ToClient,
}


def coder(name: str) -> Tagged[Any]:
    return typing.cast(Tagged[Any], getattr(m, name))


def cases() -> list[Any]:
    return [
        pytest.param(name, sample, id=f"{name}-{type(sample).__name__}")
        for name, samples in SAMPLES.items()
        for sample in samples
    ]


@pytest.mark.parametrize("name", UNIONS)
def test_every_message_has_a_sample(name: str) -> None:
    assert {type(sample) for sample in SAMPLES[name]} == set(typing.get_args(UNIONS[name]))


@pytest.mark.parametrize(("name", "sample"), cases())
def test_a_message_survives_the_wire(name: str, sample: Any) -> None:
    decoded = coder(name).decode(coder(name).encode(sample))
    assert decoded == sample
    assert type(decoded) is type(sample)


@pytest.mark.parametrize(("name", "sample"), cases())
def test_the_tag_is_the_place_in_the_union(name: str, sample: Any) -> None:
    tag = typing.get_args(UNIONS[name]).index(type(sample))
    assert msgpack.unpackb(coder(name).encode(sample), strict_map_key=False)[0] == tag


@pytest.mark.parametrize(("name", "sample"), cases())
def test_a_field_too_many_or_too_few_is_refused(name: str, sample: Any) -> None:
    parts = msgpack.unpackb(coder(name).encode(sample), strict_map_key=False)
    wrong = [[*parts, None], parts[:-1]] if len(parts) > 1 else [[*parts, None]]
    for changed in wrong:
        with pytest.raises(ProtocolError, match="fields, expected"):
            coder(name).decode(msgpack.packb(changed))


@pytest.mark.parametrize(("name", "sample"), cases())
def test_a_field_of_the_wrong_type_is_refused_by_name(name: str, sample: Any) -> None:
    parts = msgpack.unpackb(coder(name).encode(sample), strict_map_key=False)
    stranger = msgpack.Timestamp(1)
    for place, field in enumerate(sample._fields, 1):
        changed = [*parts[:place], stranger, *parts[place + 1 :]]
        with pytest.raises(ProtocolError, match=f"field {field} has the wrong type"):
            coder(name).decode(msgpack.packb(changed))


@pytest.mark.parametrize(
    "value",
    [None, 1, "text", b"bytes", [], {}, [None], ["0"], [True], [-1], [99], [2**64 - 1], [[0]]],
    ids=repr,
)
@pytest.mark.parametrize("name", UNIONS)
def test_what_is_no_message_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ProtocolError):
        coder(name).decode(msgpack.packb(value))


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc1", b"\x92\x01", b"\x92\x01\x07\x00", b"\x91" * 5000, b"\xdd\xff\xff\xff\xff"],
)
def test_what_is_no_msgpack_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        m.TO_SERVER.decode(data)


def test_booleans_and_integers_are_not_mixed_up() -> None:
    for parts in ([3, 1], [3, 0], [1, True], [1, 1.0]):
        with pytest.raises(ProtocolError, match="wrong type"):
            m.TO_SERVER.decode(msgpack.packb(parts))


@pytest.mark.parametrize("name", UNIONS)
@pytest.mark.parametrize("seed", range(4))
def test_damaged_bytes_give_a_message_or_a_protocol_error(name: str, seed: int) -> None:
    rng, decoder = random.Random(seed), coder(name)
    originals = [decoder.encode(sample) for sample in SAMPLES[name]]
    for _ in range(2500):
        data = bytearray(rng.choice(originals) if rng.random() < 0.8 else rng.randbytes(24))
        for _ in range(rng.randint(0, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            message = decoder.decode(bytes(data[: rng.randint(0, len(data))] or data))
        except ProtocolError:
            continue
        assert type(message) in typing.get_args(UNIONS[name])


def test_a_union_takes_only_types_that_can_be_checked() -> None:
    class Odd(typing.NamedTuple):
        field: set[int]

    with pytest.raises(TypeError, match="cannot be"):
        Tagged[Any](Odd, OF_A_RING)


def test_bulk_numbers_are_little_endian() -> None:
    assert m.pack_ids([1, -2]) == b"\x01\x00\x00\x00\xfe\xff\xff\xff"
    assert list(m.unpack_ids(m.pack_ids(range(5)))) == list(range(5))
    assert m.pack_request_ids([1]) == b"\x01" + bytes(7)
    assert list(m.unpack_request_ids(m.pack_request_ids([2**62]))) == [2**62]
    assert list(m.unpack_floats(m.pack_floats([-0.5, 2.0]))) == [-0.5, 2.0]
