"""Kinds of fields of a request: what each may be, said once.

A kind reads a field of a body (`Fields.read`) and is its JSON schema in /openapi.json, so that the
document says what is checked. Null is as if a field were left out: every kind takes it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nodeserve.gateway.fields import Fields
from nodeserve.types import FLOAT_RANGES, INT_RANGES

Schema = dict[str, Any]


class Kind(ABC):
    """One of these for each field of a table."""

    about: str

    @abstractmethod
    def read(self, fields: Fields, name: str) -> Any:
        """The value, or what stands for none; BadField for a wrong one."""

    @abstractmethod
    def shape(self) -> Schema:
        """What is not null, as a JSON schema."""

    def schema(self) -> Schema:
        """What may be sent."""
        shape = self.shape()
        if isinstance(kind := shape.get("type"), str):
            shape = {**shape, "type": [kind, "null"]}
        else:
            shape = {"anyOf": [shape, {"type": "null"}]}
        return {**shape, "description": self.about} if self.about else shape


@dataclass(frozen=True, slots=True)
class Flag(Kind):
    about: str = ""
    default: bool = False

    def read(self, fields: Fields, name: str) -> bool:
        return fields.flag(name, self.default)

    def shape(self) -> Schema:
        return {"type": "boolean", "default": self.default}


@dataclass(frozen=True, slots=True)
class Whole(Kind):
    """An integer from `low` to `high`."""

    low: int
    high: int
    default: int
    about: str = ""

    def read(self, fields: Fields, name: str) -> int:
        return fields.whole(name, self.default, self.low, self.high)

    def shape(self) -> Schema:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True, slots=True)
class Text(Kind):
    about: str = ""

    def read(self, fields: Fields, name: str) -> str | None:
        return fields.text(name)

    def shape(self) -> Schema:
        return {"type": "string"}


@dataclass(frozen=True, slots=True)
class Texts(Kind):
    """A string or at most `most` of them; none is empty."""

    most: int
    about: str = ""

    def read(self, fields: Fields, name: str) -> tuple[str, ...]:
        return fields.texts(name, self.most)

    def shape(self) -> Schema:
        one = {"type": "string", "minLength": 1}
        return {"anyOf": [one, {"type": "array", "items": one, "maxItems": self.most}]}


@dataclass(frozen=True, slots=True)
class Inner(Kind):
    """An object with fields of its own. That none of `required` is left out is for who reads them
    to see."""

    table: Mapping[str, Kind]
    about: str = ""
    required: tuple[str, ...] = ()

    def read(self, fields: Fields, name: str) -> Fields:
        return fields.inner(name, self.table)

    def shape(self) -> Schema:
        return object_schema(self.table, self.required)


@dataclass(frozen=True, slots=True)
class Given(Kind):
    """Passed on as it is: who takes it checks it."""

    form: Schema
    about: str = ""

    def read(self, fields: Fields, name: str) -> Any:
        return fields.given(name)

    def shape(self) -> Schema:
        return self.form


@dataclass(frozen=True, slots=True)
class Only(Kind):
    """Taken where it asks for nothing; what else it may be elsewhere, this server has not."""

    harmless: tuple[Any, ...]
    about: str = "Not supported: any other value is refused."

    def read(self, fields: Fields, name: str) -> Any:
        return fields.given(name)

    def shape(self) -> Schema:
        return {"enum": [*self.harmless, None]}

    def schema(self) -> Schema:
        return {**self.shape(), "description": self.about}


def object_schema(table: Mapping[str, Kind], required: tuple[str, ...] = ()) -> Schema:
    """Of an object with these fields. Others are ignored."""
    properties = {name: table[name].schema() for name in sorted(table)}
    for name in required:  # null is as if it were left out, and that it cannot be
        shape = table[name].shape()
        properties[name] = {**shape, "description": table[name].about}
    schema: Schema = {"type": "object", "properties": properties}
    return {**schema, "required": list(required)} if required else schema


def sampled(name: str, about: str = "") -> Given:
    """A number of types.Sampling; its range is looked at where the model is known."""
    if name in INT_RANGES:
        low, high = INT_RANGES[name]
        return Given({"type": "integer", "minimum": low, "maximum": high}, about)
    least, most, above = FLOAT_RANGES[name]
    bound = "exclusiveMinimum" if above else "minimum"
    return Given({"type": "number", bound: least, "maximum": most}, about)
