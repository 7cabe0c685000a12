"""Functions that a model may call: how a prompt tells of them, and how an answer that must call one
is written.

Models differ in how they write calls; the chat template shows which way a model has learnt
(`style_of`). Reading calls is `tool_parser`'s.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from nodeserve.text.constraints import json_rule, quoted
from nodeserve.text.tool_parser import (
    DEEPSEEK_CALL,
    DEEPSEEK_CALLS,
    DEEPSEEK_SEPARATOR,
    STYLES,
    ToolParser,
)

Message = dict[str, Any]
Mark = Callable[[str], str]  # a marker as a grammar has it: a special token, or its text
MAX_CALLS = 16  # in one answer that must call
NO_ARGUMENTS: dict[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function: `described` is what the template is told, as OpenAI's API has it."""

    name: str
    described: Mapping[str, Any]
    parameters: Mapping[str, Any] = field(default_factory=lambda: NO_ARGUMENTS)  # a JSON schema


@dataclass(frozen=True, slots=True)
class Style:
    """How a model writes calls."""

    name: str  # one of STYLES
    fenced: bool = False  # arguments as DeepSeek V3 has them
    bare: bool = False  # names and arguments as Mistral has them since 2025
    knows_tools: bool = True  # the chat template tells of functions itself

    @property
    def markers(self) -> frozenset[str]:
        """Special tokens that must stay in the text for the parser to see."""
        return _MARKERS[self.name]

    def parser(self, tools: Sequence[Tool]) -> ToolParser:
        return ToolParser(STYLES[self.name], frozenset(tool.name for tool in tools))


_MARKERS = {
    "hermes": frozenset({"<tool_call>", "</tool_call>"}),
    "llama3_json": frozenset({"<|python_tag|>"}),
    "mistral": frozenset({"[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"}),
    "deepseek": frozenset({*DEEPSEEK_CALLS, *DEEPSEEK_CALL, DEEPSEEK_SEPARATOR}),
}
_SIGNS = {  # of a style in a chat template, the surest first
    "<tool_call>": "hermes",
    "[TOOL_CALLS]": "mistral",
    "tool▁call": "deepseek",
    "<|python_tag|>": "llama3_json",
    "ipython": "llama3_json",
}


def style_of(template: str, name: str | None = None) -> Style:
    """Of a model with this chat template; `name` says it where the template does not."""
    found = (style for sign, style in _SIGNS.items() if sign in template)
    return Style(
        name or next(found, "hermes"),
        fenced="```json" in template,
        bare="[ARGS]" in template,
        knows_tools="tools" in template,
    )


# ---- answers that must call


def calls_rules(style: Style, tools: Sequence[Tool], parallel: bool, mark: Mark) -> str:
    """Rules of a grammar in Lark's notation, of which `calls` is a call of one of these functions,
    or with `parallel` one or more, written in this style."""
    write = _WRITERS[style.name]
    lines = write(style, parallel, mark)
    names = " | ".join(f"call_{place}" for place in range(len(tools)))
    lines.append(f"one: {names}")
    for place, tool in enumerate(tools):
        lines.append(f"call_{place}: {_one(style, tool.name, f'args_{place}', mark)}")
        lines.append(f"args_{place}: {json_rule(tool.parameters)}")
    return "\n".join(lines)


def _several(one: str, between: str, parallel: bool) -> str:
    """A model that cannot stop would call for ever."""
    return f"{one} ({between} {one}){{0,{MAX_CALLS - 1}}}" if parallel else one


def _hermes(style: Style, parallel: bool, mark: Mark) -> list[str]:
    block = f"{mark('<tool_call>')} {quoted(chr(10))} one {quoted(chr(10))} {mark('</tool_call>')}"
    return [f"calls: {_several('block', quoted(chr(10)), parallel)}", f"block: {block}"]


def _llama3(style: Style, parallel: bool, mark: Mark) -> list[str]:
    return ["calls: one"]  # it has learnt to write one at a time


def _mistral(style: Style, parallel: bool, mark: Mark) -> list[str]:
    begin = mark("[TOOL_CALLS]")
    if style.bare:
        return [f"calls: {_several('block', '', parallel)}", f"block: {begin} one"]
    return [f'calls: {begin} "[" {_several("one", quoted(", "), parallel)} "]"']


def _deepseek(style: Style, parallel: bool, mark: Mark) -> list[str]:
    first, last = map(mark, DEEPSEEK_CALLS)
    begin, end = map(mark, DEEPSEEK_CALL)
    between = quoted("\n") if style.fenced else ""
    return [
        f"calls: {first} {_several('block', between, parallel)} {last}",
        f"block: {begin} one {end}",
    ]


_WRITERS: dict[str, Callable[[Style, bool, Mark], list[str]]] = {
    "hermes": _hermes,
    "llama3_json": _llama3,
    "mistral": _mistral,
    "deepseek": _deepseek,
}


def _one(style: Style, name: str, arguments: str, mark: Mark) -> str:
    if style.name == "deepseek":
        separator = mark(DEEPSEEK_SEPARATOR)
        if not style.fenced:
            return f"{quoted(name)} {separator} {arguments}"
        fence = quoted(f"{name}\n```json\n")
        return f'"function" {separator} {fence} {arguments} {quoted(chr(10) + "```")}'
    if style.name == "mistral" and style.bare:
        return f"{quoted(name)} {mark('[ARGS]')} {arguments}"
    key = "parameters" if style.name == "llama3_json" else "arguments"
    return f'{quoted(f"""{{"name": "{name}", "{key}": """)} {arguments} "}}"'


# ---- what the template is given


def with_tools(
    style: Style, messages: Sequence[Message], tools: Sequence[Tool]
) -> tuple[list[Message], dict[str, Any]]:
    """Messages, and variables beside them, that tell a template of functions, and of calls and
    results so far. A template that does not know of them gets them in words."""
    prepared = [_with_parsed_arguments(message) for message in messages]
    if not style.knows_tools:
        return _in_words(prepared, tools), {}
    return prepared, {"tools": [dict(tool.described) for tool in tools]} if tools else {}


def _with_parsed_arguments(message: Message) -> Message:
    """Templates write arguments as JSON themselves; the API has them as text."""
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_parsed(call) for call in calls]}


def _parsed(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):  # an answer that was cut off
        return call
    return {**call, "function": {**function, "arguments": arguments}}


_TOLD = """\
You may call functions. These are their signatures, one JSON object a line:
<tools>
{tools}
</tools>
To call one, write its name and its arguments as a JSON object, in this way:
<tool_call>
{{"name": "NAME", "arguments": {{}}}}
</tool_call>"""


def _in_words(messages: list[Message], tools: Sequence[Tool]) -> list[Message]:
    said = list(map(_plain, messages))
    if not tools:
        return said
    told = _TOLD.format(
        tools="\n".join(map(partial(json.dumps, ensure_ascii=False), _shown(tools)))
    )
    first = said[0] if said and isinstance(said[0], dict) else {}
    if first.get("role") == "system" and isinstance(first.get("content"), str):
        return [{**first, "content": f"{first['content']}\n\n{told}"}, *said[1:]]
    return [{"role": "system", "content": told}, *said]


def _shown(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    return [dict(tool.described) for tool in tools]


def _plain(message: Message) -> Message:
    """A call as the assistant's text, its result as the user's."""
    if not isinstance(message, dict):
        return message
    if message.get("role") == "tool" and isinstance(message.get("content"), str):
        words = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": words}
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not calls:
        return message
    functions = [call.get("function") for call in calls if isinstance(call, dict)]
    blocks = [_block(function) for function in functions if isinstance(function, dict)]
    text = message.get("content")
    parts = [text, *blocks] if isinstance(text, str) and text else blocks
    return {"role": "assistant", "content": "\n".join(parts)}


def _block(function: Mapping[str, Any]) -> str:
    shown = {"name": function.get("name"), "arguments": function.get("arguments")}
    return f"<tool_call>\n{json.dumps(shown, ensure_ascii=False)}\n</tool_call>"
