"""The layout grammar, complete, and the words of its errors."""

import pytest

from nodeserve.errors import ConfigError
from nodeserve.layout import Group, Layout, Shape, check_devices, parse_gpus, parse_layout
from nodeserve.types import Role

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED

GOOD = {
    "1p1d": (Group(1, P), Group(1, D)),
    "4p4d": (Group(4, P), Group(4, D)),
    "4p,4d": (Group(4, P), Group(4, D)),
    "8m": (Group(8, M),),
    "2p:tp2,4d": (Group(2, P, Shape(tp=2)), Group(4, D)),
    "1p:tp2.pp2,1d:tp4": (Group(1, P, Shape(tp=2, pp=2)), Group(1, D, Shape(tp=4))),
    "1p:ep4,1d:ep4": (Group(1, P, Shape(ep=4)), Group(1, D, Shape(ep=4))),
    "1p1d2m": (Group(1, P), Group(1, D), Group(2, M)),
    "10p6d": (Group(10, P), Group(6, D)),
}

BAD = {
    "": "empty",
    "p": "cannot read 'p'",
    "4": "cannot read '4'",
    "4p 4d": "cannot read ' 4d'",
    "4p4x": "unknown role 'x'",
    "0p1d": "count must be from 1",
    "4p": "nobody for decode",
    "4d": "nobody for prefill",
    "1p1d,": "missing after the last comma",
    "1p:,1d": "unknown shape ''",
    "1p:tp,1d": "unknown shape 'tp'",
    "1p:tp0,1d": "tp0 must be from 1",
    "1p:tp2.tp4,1d": "tp is given twice",
    "1p:tp21d": "unknown shape 'tp21d'",
    "1p:dp2,1d": "unknown shape 'dp2'",
    "9999999m": "count must be from 1",
    "1000m1000m": "at most 1024",
    "1P1D": "cannot read",
}


@pytest.mark.parametrize("text", GOOD)
def test_a_layout_is_read_and_written_back(text: str) -> None:
    layout = parse_layout(text)
    assert layout == Layout(GOOD[text])
    assert parse_layout(str(layout)) == layout


@pytest.mark.parametrize("text", BAD)
def test_a_bad_layout_says_what_is_wrong(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_layout(text)
    assert BAD[text] in str(caught.value)


def test_workers_are_counted_over_shapes() -> None:
    assert parse_layout("2p:tp2,4d").num_workers == 8
    assert parse_layout("1p:tp2.pp2,1d:tp4").num_workers == 8
    assert parse_layout("2p1d").roles == (P, P, D)


@pytest.mark.parametrize(("num_devices", "word"), [(7, "1 missing"), (10, "2 left over")])
def test_devices_must_match_the_layout(num_devices: int, word: str) -> None:
    check_devices(parse_layout("4p4d"), 8)
    with pytest.raises(ConfigError, match=word):
        check_devices(parse_layout("4p4d"), num_devices)


def test_gpu_lists() -> None:
    assert parse_gpus("0-3") == (0, 1, 2, 3)
    assert parse_gpus("0,2, 5") == (0, 2, 5)
    assert parse_gpus("0,0") == (0, 0)
    for text in ("", "a", "3-1", "0--2", "0,"):
        with pytest.raises(ConfigError):
            parse_gpus(text)
