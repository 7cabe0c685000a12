"""Fields that say what an answer's text must be: OpenAI's response_format, and vLLM's."""

from typing import Any

from nodeserve.errors import InvalidRequest
from nodeserve.gateway.fields import Fields
from nodeserve.text import constraints
from nodeserve.types import Constraint, shown

# What vLLM calls them, within structured_outputs and behind "guided_".
_KINDS = {
    "json": "json_schema",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}
_GUIDED = {f"guided_{name}": name for name in ("json", "regex", "choice", "grammar")}
_NO_OTHERS: dict[str, tuple[Any, ...]] = {
    "disable_additional_properties": (False,),
    "disable_any_whitespace": (False,),
    "structural_tag": (),
    "whitespace_pattern": (),
}


def constraint_of(fields: Fields) -> tuple[str, Constraint | None]:
    """The field that constrains the answer, and how; BadField if it cannot be, or if two do."""
    found = [(name, one) for name, one in _all(fields) if one is not None]
    if len(found) > 1:
        (first, _), (second, _), *_ = found
        raise fields.error(second, f"cannot be given beside {first}")
    return found[0] if found else ("", None)


def _all(fields: Fields) -> list[tuple[str, Constraint | None]]:
    found = [_response_format(fields)]
    inner = fields.inner("structured_outputs")
    inner.only(_NO_OTHERS, "is not supported by this server")
    for name in _KINDS:
        # Only true says something: vLLM's clients send the others as well.
        if name in inner and inner.given(name) is not False:
            found.append((f"structured_outputs.{name}", _made(inner, name, name)))
    found += [(name, _made(fields, name, kind)) for name, kind in _GUIDED.items() if name in fields]
    return found


def _made(fields: Fields, name: str, kind: str) -> Constraint:
    try:
        return constraints.constraint_of({_KINDS[kind]: fields.given(name)})
    except InvalidRequest as problem:
        raise fields.error(name, str(problem).removeprefix("constraint ")) from None


def _response_format(fields: Fields) -> tuple[str, Constraint | None]:
    asked = fields.inner("response_format")
    kind = asked.text("type")
    if "response_format" not in fields or kind == "text":
        return "response_format", None
    if kind == "json_object":
        return "response_format", constraints.constraint_of({"json_object": True})
    if kind != "json_schema":
        words = f"must be text, json_object or json_schema, got {shown(kind)}"
        raise asked.error("type", words)
    described = asked.inner("json_schema")
    schema = described.given("schema")
    where = "response_format.json_schema.schema"
    if not isinstance(schema, dict | bool):
        raise described.error("schema", f"must be a JSON schema, got {shown(schema)}")
    return where, constraints.constraint_of({"json_schema": schema})
