"""Closed unions of messages as msgpack arrays: [tag, field, field, ...].

A message is a NamedTuple; its tag is its place in the union, so a union only ever grows at its end.
`decode` refuses unknown tags, wrong numbers of fields and wrong types with ProtocolError: bytes
from a client can never become anything but one of the messages, or that error, and they take no
more memory than the union's `Limits` allow.
"""

import io
import types
import typing
from collections.abc import Callable
from operator import contains
from typing import Any, Generic, NamedTuple, TypeVar

import msgpack

from nodeserve.errors import ProtocolError
from nodeserve.wire.limits import MAX_EXTENSION_BYTES, Limits

Message = TypeVar("Message")
_Types = frozenset[type]

# A message up to this long is decoded at once: whatever lists it announces inside each other, none
# longer than itself, they take some 150 KB. Of a longer one somebody first sees that it is whole.
SHORT_BYTES = 256
_PART_BYTES = 1 << 16

_PLAIN: dict[Any, _Types] = {
    **{kind: frozenset((kind,)) for kind in (int, str, bytes, bool, dict, list, type(None))},
    float: frozenset((float, int)),
}


def _types_of(hint: Any) -> _Types:
    """What a value for such a field may be, exactly: a bool is no int."""
    if hint in _PLAIN:
        return _PLAIN[hint]
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return frozenset().union(*map(_types_of, typing.get_args(hint)))
    if origin in (list, dict):
        # Elements are checked by whoever reads them; the container's kind is checked here.
        return _PLAIN[origin]
    raise TypeError(f"a message field cannot be {hint!r}")


class _Kind(NamedTuple):
    make: Callable[..., Any]
    names: tuple[str, ...]
    types: tuple[_Types, ...]


def _kind(cls: Any) -> _Kind:
    hints = typing.get_type_hints(cls)
    return _Kind(cls._make, cls._fields, tuple(_types_of(hints[name]) for name in cls._fields))


def _check_whole(data: bytes | memoryview) -> None:
    """Raise unless all that `data` announces is there.

    The decoder takes memory for as many entries as a list announces when it reads its header. After
    this they are, all lists together, no more than the message has bytes. Nothing is made here.
    """
    # 0: any size. Only a value that is longer than a part is held as a whole, beside the message.
    msgpack.Unpacker(io.BytesIO(data), read_size=_PART_BYTES, max_buffer_size=0).skip()


class _Counter:
    """Lets `left` more containers pass."""

    def __init__(self) -> None:
        self.left = 0

    def __call__(self, container: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError("too many arrays and maps")
        return container


class Tagged(Generic[Message]):
    """Encoder and decoder of one union; built once, at import."""

    def __init__(self, union: Any, limits: Limits) -> None:
        members = typing.get_args(union) or (union,)
        self._tags: dict[type, int] = {cls: tag for tag, cls in enumerate(members)}
        self._kinds = [_kind(cls) for cls in members]
        self._pack = msgpack.Packer(autoreset=True).pack
        self._max_containers = limits.max_containers
        self._counter = counter = _Counter()
        bounds: dict[str, Any] = {
            "strict_map_key": False,
            "use_list": True,
            "max_str_len": limits.max_text_bytes,
            "max_array_len": limits.max_items,
            "max_map_len": limits.max_items,
            "max_ext_len": MAX_EXTENSION_BYTES,
        }
        short = {**bounds, "max_array_len": min(limits.max_items, SHORT_BYTES)}
        hooks = {"list_hook": counter, "object_hook": counter}
        # By whether it is longer than SHORT_BYTES, and 2 if its containers have to be counted.
        self._options = (short, bounds, {**short, **hooks}, {**bounds, **hooks})

    def encode(self, message: Message) -> bytes:
        tag = self._tags[type(message)]
        return self._pack((tag, *message))  # type: ignore[misc, no-any-return]

    def parts(self, message: Message) -> tuple[Any, ...]:
        """Tag and fields, to be put into another message."""
        return (self._tags[type(message)], *message)  # type: ignore[misc]

    def decode(self, data: bytes | memoryview) -> Message:
        """The message in `data`; ProtocolError says what is wrong with anything else."""
        is_long = len(data) > SHORT_BYTES
        is_counted = len(data) > self._max_containers  # or it has no more: each takes a byte
        self._counter.left = self._max_containers
        try:
            if is_long:
                _check_whole(data)
            parts = msgpack.unpackb(data, **self._options[is_long + 2 * is_counted])
        except (
            ValueError,
            TypeError,  # a map or an array as the key of a map
            msgpack.UnpackException,
            RecursionError,
            MemoryError,  # for what the message announced; nothing of it was kept
        ) as problem:
            raise ProtocolError(f"not a msgpack message: {problem}") from None
        return self.made_of(parts)

    def made_of(self, parts: Any) -> Message:
        """The message that these unpacked `parts` are; they are used up. ProtocolError as above."""
        if type(parts) is not list or not parts or type(parts[0]) is not int:
            raise ProtocolError("a message is an array that starts with its tag")
        tag = parts.pop(0)
        if not 0 <= tag < len(self._kinds):
            raise ProtocolError(f"unknown message tag {tag}; known: 0 to {len(self._kinds) - 1}")
        message: Message = self._build(self._kinds[tag], parts)
        return message

    @staticmethod
    def _build(kind: _Kind, parts: list[Any]) -> Any:
        if len(parts) != len(kind.names):
            raise ProtocolError(
                f"message has {len(parts)} fields, expected {len(kind.names)}:"
                f" {', '.join(kind.names)}"
            )
        if not all(map(contains, kind.types, map(type, parts))):  # no Python for each field
            for name, allowed, value in zip(kind.names, kind.types, parts, strict=True):
                if type(value) not in allowed:
                    raise ProtocolError(f"field {name} has the wrong type: {type(value).__name__}")
        return kind.make(parts)
