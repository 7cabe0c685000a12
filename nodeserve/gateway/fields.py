"""Reads the fields of a JSON object, one typed question after the other; null is as if left out."""

import json
from collections.abc import Mapping
from typing import Any, Protocol

from nodeserve.errors import InvalidRequest
from nodeserve.gateway.problems import BadField
from nodeserve.types import shown

REFUSED = "is not supported by this server"


def json_object(data: bytes) -> dict[str, Any]:
    """The body of a request; InvalidRequest says what it is instead."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as problem:  # ValueError: no UTF-8, or no JSON
        raise InvalidRequest(f"the body is no JSON: {problem}") from None
    if not isinstance(found, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {shown(found)}")
    return found


class Reads(Protocol):
    """A kind of fields (kinds.py)."""

    def read(self, fields: "Fields", name: str) -> Any: ...


class Fields:
    """Answers with the value, or with `default` where there is none; BadField for a wrong one.

    `read` asks as `table` says; kinds of fields are made of the other methods.
    """

    def __init__(
        self, values: Mapping[str, Any], table: Mapping[str, Reads] | None = None, where: str = ""
    ) -> None:
        self._values = values
        self._table = table or {}
        self._where = where  # in front of names in errors: "stream_options."

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def knows(self, name: str) -> bool:
        """Whether the table has it."""
        return name in self._table

    def path(self, name: str) -> str:
        """As errors name it: from the outermost object."""
        return self._where + name

    def read(self, name: str) -> Any:
        """What the table's kind of this field makes of it."""
        return self._table[name].read(self, name)

    def given(self, name: str) -> Any:
        """As it is; None where there is none."""
        return self._values.get(name)

    def error(self, name: str, words: str) -> BadField:
        return BadField(self.path(name), words)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, got {shown(value)}")
        return value

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(name, f"must be an integer from {low} to {high}, got {shown(value)}")
        return value

    def text(self, name: str) -> str | None:
        value = self._values.get(name)
        if value is not None and not isinstance(value, str):
            raise self.error(name, f"must be a string, got {shown(value)}")
        return value

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A string or a list of them; none may be empty."""
        value = self._values.get(name)
        if value is None:
            return ()
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found):
            words = "must be a string that is not empty, or a list of them"
            raise self.error(name, f"{words}, got {shown(value)}")
        if len(found) > most:
            raise self.error(name, f"has {len(found)} strings; at most {most} are taken")
        return tuple(found)

    def inner(self, name: str, table: Mapping[str, Reads] | None = None) -> "Fields":
        """Those of an object inside; empty where there is none."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, f"must be an object, got {shown(value)}")
        return Fields(value or {}, table, f"{self.path(name)}.")

    def only(self, harmless: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuse, by name, those fields whose value would change the answer and cannot."""
        for name, values in harmless.items():
            value = self._values.get(name)
            if value is not None and not any(_same(value, one) for one in values):
                raise self.error(name, f"{REFUSED}, got {shown(value)}")


def _same(value: object, known: object) -> bool:
    """As JSON has it: true is not 1."""
    return value == known and isinstance(value, bool) == isinstance(known, bool)


def is_ids(value: object) -> bool:
    """Whether it is a list of token ids, of which there is at least one."""
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)
