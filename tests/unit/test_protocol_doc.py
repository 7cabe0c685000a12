"""docs/protocol.md says what the code does: tables against the unions, bytes replayed."""

import re
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from nodeserve.client.connection import MAX_INCOMING_BYTES
from nodeserve.errors import ERRORS
from nodeserve.types import MAX_LISTED, Sampling, Timings
from nodeserve.wire import limits, messages, tracing
from nodeserve.wire.frames import FrameReader, frame
from nodeserve.wire.messages import PROTOCOL_VERSION, TO_CLIENT, TO_SERVER, pack_ids

TEXT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
NAMES = {"dict": "map", "NoneType": "nil"}


def section(title: str) -> str:
    return re.split(r"\n#+ ", TEXT.split(f"# {title}\n")[1])[0]


def rows(title: str) -> list[list[str]]:
    """The cells of a section's table, without the heading."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def type_name(hint: Any) -> str:
    """A field's type in the words of the page."""
    options = typing.get_args(hint) if typing.get_origin(hint) not in (dict, list) else ()
    if options:
        return " or ".join(type_name(option) for option in options)
    name: str = (typing.get_origin(hint) or hint).__name__
    return NAMES.get(name, name)


@pytest.mark.parametrize(
    ("title", "union"),
    [
        ("From the client", messages.ToServer),
        ("From the server", messages.ToClient),
        ("A trace", tracing.Event),
    ],
)
def test_the_tables_of_messages_are_the_unions(title: str, union: Any) -> None:
    expected = []
    for tag, cls in enumerate(typing.get_args(union)):
        hints = typing.get_type_hints(cls)
        described = ", ".join(f"{name}: {type_name(hints[name])}" for name in cls._fields)
        expected.append([str(tag), cls.__name__, described])
    assert [row for row in rows(title) if row[0].isdigit()] == expected


def test_the_table_of_errors_is_complete() -> None:
    assert [row[0] for row in rows("Errors")] == list(ERRORS)


def test_the_table_of_sampling_is_complete() -> None:
    shown = {row[0]: row[1] for row in rows("Sampling")}
    words = {"None": "nil", "False": "false", "()": "[]"}
    default = Sampling()
    assert list(shown) == [field.name for field in fields(Sampling)]
    for name, text in shown.items():
        value = str(getattr(default, name))
        assert text == words.get(value, value), name


def test_the_table_of_limits_is_what_is_checked() -> None:
    ours, theirs = limits.OF_A_CLIENT, limits.OF_THE_SERVER
    assert [row[1:] for row in rows("Limits")] == [
        ["`max_frame_bytes`", str(MAX_INCOMING_BYTES)],
        [str(ours.max_items), str(theirs.max_items)],
        [str(ours.max_containers), str(theirs.max_containers)],
        [str(ours.max_text_bytes), str(theirs.max_text_bytes)],
        [str(limits.MAX_EXTENSION_BYTES)] * 2,
    ]
    assert f"{MAX_LISTED:,} entries" in section("Limits")


def test_timings_and_version_are_named() -> None:
    assert TEXT.startswith(f"# The client protocol, version {PROTOCOL_VERSION}\n")
    for field in fields(Timings):
        assert f"`{field.name}`" in section("From the server")


def exchange() -> list[tuple[str, str, bytes]]:
    pattern = re.compile(r"^    ([<>]) (.+)\n((?:      (?:[0-9a-f]{2} ?)+\n)+)", re.MULTILINE)
    found = pattern.findall(section("An exchange, byte by byte") + "\n")
    return [(side, call, bytes.fromhex(data.replace("\n", " "))) for side, call, data in found]


def test_the_exchange_is_whole() -> None:
    assert len(exchange()) == section("An exchange, byte by byte").count("(") - 2


@pytest.mark.parametrize(("side", "call", "data"), exchange(), ids=lambda value: str(value)[:12])
def test_the_documented_bytes_are_the_messages(side: str, call: str, data: bytes) -> None:
    names = {**vars(messages), "ids": lambda *ids: pack_ids(ids)}
    message = eval(call, {"__builtins__": {}}, names)
    union: Any = TO_SERVER if side == ">" else TO_CLIENT
    assert frame(union.encode(message)) == data
    assert [union.decode(payload) for payload in FrameReader(1 << 20).feed(data)] == [message]
