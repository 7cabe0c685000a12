"""Fields about functions that a model may call: tools, tool_choice, parallel_tool_calls."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from nodeserve.gateway.fields import Fields
from nodeserve.gateway.tables import FUNCTION_NAME, MAX_TOOLS, TOOL
from nodeserve.text.tools import NO_ARGUMENTS, Tool
from nodeserve.types import shown

_NAME = re.compile(FUNCTION_NAME["pattern"])  # some of these go into grammars as they are


@dataclass(frozen=True, slots=True)
class Tooling:
    """What a model is told of, and what it may call; with `must` it answers with a call."""

    tools: tuple[Tool, ...]
    allowed: tuple[Tool, ...]
    must: bool
    parallel: bool


def tooling_of(fields: Fields) -> Tooling | None:
    """None where nothing may be called; BadField for what cannot be."""
    tools = tools_of(fields)
    parallel = fields.read("parallel_tool_calls")
    choice = fields.read("tool_choice")
    if not tools:
        if choice not in (None, "none", "auto"):
            raise fields.error("tool_choice", f"needs tools, got {shown(choice)}")
        return None
    match choice:
        case "none":
            return None
        case None | "auto":
            return Tooling(tools, tools, False, parallel)
        case "required":
            return Tooling(tools, tools, True, parallel)
        case {"type": "function", "function": {"name": str(name)}}:
            allowed = tuple(tool for tool in tools if tool.name == name)
            if not allowed:
                raise fields.error("tool_choice", f"names {shown(name)}, which is not in tools")
            return Tooling(tools, allowed, True, False)
    words = "must be none, auto, required or a function by its name"
    raise fields.error("tool_choice", f"{words}, got {shown(choice)}")


def tools_of(fields: Fields) -> tuple[Tool, ...]:
    given = fields.read("tools")
    if given is None:
        return ()
    if not isinstance(given, list) or len(given) > MAX_TOOLS:
        raise fields.error("tools", f"must be a list of at most {MAX_TOOLS}, got {shown(given)}")
    tools = tuple(_tool(one, f"tools[{place}]") for place, one in enumerate(given))
    if len({tool.name for tool in tools}) < len(tools):
        raise fields.error("tools", "must have different names")
    return tools


def _tool(given: object, where: str) -> Tool:
    if not isinstance(given, Mapping):
        raise Fields({}).error(where, f"must be an object, got {shown(given)}")
    fields = Fields(given, TOOL, f"{where}.")
    if (kind := fields.read("type")) != "function":
        raise fields.error("type", f"must be function, got {shown(kind)}")
    function = fields.read("function")
    name = function.read("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        words = "must be 1 to 64 letters, digits, dots, dashes and underscores"
        raise function.error("name", f"{words}, got {shown(name)}")
    function.read("description")
    given_schema = function.read("parameters")
    schema = {} if given_schema is None else given_schema
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        words = "must be a JSON schema of an object"
        raise function.error("parameters", f"{words}, got {shown(schema)}")
    return Tool(name, given, {"type": "object", **schema} if schema else NO_ARGUMENTS)
