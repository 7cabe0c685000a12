"""Chat templates: jinja2 in a sandbox, with the helpers that model authors expect.

A template comes with a model and is not trusted; messages come with a request and are checked
here, so that a template sees dictionaries with a role and text.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from nodeserve.errors import InvalidRequest, ModelError

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]


class ChatTemplate:
    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self._source = source
        self._tokens = dict(tokens)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool, variables: dict[str, Any]
    ) -> str:
        import jinja2

        conversation = checked_messages(messages)
        given = {
            **self._tokens,
            **variables,
            "messages": conversation,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(given)
        except (
            jinja2.TemplateError, ArithmeticError, AttributeError, LookupError,
            RecursionError, TypeError, ValueError,
        ) as error:  # fmt: skip
            raise InvalidRequest(f"the chat template refuses these messages: {error}") from None

    @cached_property
    def _template(self) -> "jinja2.Template":
        import jinja2

        try:
            return _environment().from_string(self._source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the model's chat template is not valid: {error}") from None


def checked_messages(messages: object) -> list[dict[str, Any]]:
    """The messages with text parts joined; InvalidRequest names what is wrong."""
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidRequest("messages must be a list of at least one message")
    return [_checked_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _checked_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{where} must be an object with role and content, got {message!r}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{where}.role must be a string such as 'user', got {role!r}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return {"content": None, **message}
    return {**message, "content": _text(content, f"{where}.content")}


def _text(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise InvalidRequest(f"{where} must be a string or a list of text parts, got {content!r}")
    return "\n".join(_part(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text":
        raise InvalidRequest(f"{where}.type must be 'text', got {kind!r}: only text is supported")
    text = part["text"] if isinstance(part, Mapping) and "text" in part else None
    if not isinstance(text, str):
        raise InvalidRequest(f"{where}.text must be a string, got {text!r}")
    return text


def _environment() -> "jinja2.Environment":
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks an answer for training; here it is only its contents."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own escapes HTML, which no prompt wants."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(str(message))


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
