"""Fields that say what an answer's text must be: OpenAI's response_format and text, and vLLM's."""

from nodeserve.errors import InvalidRequest
from nodeserve.gateway.fields import Fields
from nodeserve.gateway.tables import EXPRESSIONS, NOT_IN_TEXT, NOT_STRUCTURED
from nodeserve.text import constraints
from nodeserve.types import Constraint, shown

ANY = {"json_object": True}
_GUIDED = {f"guided_{name}": name for name in EXPRESSIONS}


def constraint_of(fields: Fields) -> tuple[str, Constraint | None]:
    """The field that constrains the answer, and how; BadField if it cannot be, or if two do."""
    found = [(name, one) for name, one in _all(fields) if one is not None]
    if len(found) > 1:
        (first, _), (second, _), *_ = found
        raise fields.error(second, f"cannot be given beside {first}")
    return found[0] if found else ("", None)


def _all(fields: Fields) -> list[tuple[str, Constraint | None]]:
    found = [_response_format(fields), _text_format(fields)]
    inner = fields.read("structured_outputs")
    inner.only(NOT_STRUCTURED)
    if inner.read("json_object"):
        found.append(("structured_outputs.json_object", constraints.constraint_of(ANY)))
    names = [name for name in EXPRESSIONS if name in inner]
    found += [(f"structured_outputs.{name}", _made(inner, name, name)) for name in names]
    return found + [
        (one, _made(fields, one, name)) for one, name in _GUIDED.items() if one in fields
    ]


def _made(fields: Fields, field: str, name: str) -> Constraint:
    kind = "json_schema" if name == "json" else name
    try:
        return constraints.constraint_of({kind: fields.read(field)})
    except InvalidRequest as problem:
        raise fields.error(field, str(problem).removeprefix("constraint ")) from None


def _response_format(fields: Fields) -> tuple[str, Constraint | None]:
    return _format(fields, "response_format", "json_schema")


def _text_format(fields: Fields) -> tuple[str, Constraint | None]:
    """Responses have another place for the same."""
    if not fields.knows("text"):
        return "", None
    text = fields.read("text")
    text.only(NOT_IN_TEXT)
    return _format(text, "format", None)


def _format(fields: Fields, name: str, place: str | None) -> tuple[str, Constraint | None]:
    """`place`: of what describes the schema, None if the format does itself."""
    asked = fields.inner(name)
    kind = asked.text("type")
    if name not in fields or kind == "text":
        return "", None
    if kind == "json_object":
        return fields.path(name), constraints.constraint_of(ANY)
    if kind != "json_schema":
        words = f"must be text, json_object or json_schema, got {shown(kind)}"
        raise asked.error("type", words)
    described = asked if place is None else asked.inner(place)
    schema = described.given("schema")
    if not isinstance(schema, dict | bool):
        raise described.error("schema", f"must be a JSON schema, got {shown(schema)}")
    return described.path("schema"), constraints.constraint_of({"json_schema": schema})
