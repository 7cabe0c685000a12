"""Finds the calls of functions in an answer's text, whichever way a model writes them.

A parser reads character by character and decides by what it has read alone, so an answer gives the
same wherever it was cut into parts. What is no call is content; white space beside calls is not. A
call begins when its name is known, its arguments follow as they come, as the model wrote them. One
that is malformed before its name is content as well; behind it, whatever came of it stays.
"""

import json
from collections.abc import Callable, Generator
from typing import NamedTuple

Steps = Generator[None, str, None]  # is sent characters
Text = Generator[None, str, str]


class Content(NamedTuple):
    """Text of the answer itself."""

    text: str


class Call(NamedTuple):
    """A call begins; the arguments that follow are its own."""

    name: str


class Arguments(NamedTuple):
    """A part of the latest call's arguments, which are JSON together."""

    text: str


Event = Content | Call | Arguments
_CLOSING = {"{": "}", "[": "]"}
_NAMES, _ARGUMENTS = ("name",), ("arguments", "parameters")
_HARMLESS = ("type", "id")  # of other keys that calls have
MAX_SPACE = 256  # characters beside a call; a model that writes nothing else would cost ever more


class _Malformed(Exception):
    """No call."""


class ToolParser:
    """Of one answer. `names` are the functions that there are."""

    def __init__(self, style: "Callable[[ToolParser], Steps]", names: frozenset[str]) -> None:
        self.names = names
        self.num_calls = 0
        self.is_open = False  # a call has begun and is not over
        self._text = ""  # read, and neither emitted nor part of a call that has begun
        self._last = ""  # the last character read
        self._again = False  # and it is to be read again
        self._events: list[Event] = []
        self._kind: type[Content] | type[Arguments] = Content  # of the parts that follow those
        self._parts: list[str] = []
        self._steps = style(self)
        next(self._steps)

    def push(self, text: str) -> list[Event]:
        """What this part of the answer says; neighbours of a kind are joined."""
        for character in text:
            self._steps.send(character)
        return self._taken()

    def finish(self) -> list[Event]:
        """What was held back, when nothing follows."""
        self._steps.close()
        if not self.is_open and not (self.num_calls and self._text.isspace()):
            self.give_back()
        return self._taken()

    def _taken(self) -> list[Event]:
        self._join()
        events, self._events = self._events, []
        return events

    def _emit(self, kind: type[Content] | type[Arguments], text: str) -> None:
        if kind is not self._kind:
            self._join()
            self._kind = kind
        self._parts.append(text)

    def _join(self) -> None:
        if text := "".join(self._parts):
            self._events.append(self._kind(text))
        self._parts.clear()

    # ---- for styles

    def get(self) -> Text:
        """The next character. Parsing pauses where there is none yet."""
        if self._again:
            self._again = False
        else:
            self._last = yield
        if not self.is_open:
            self._text += self._last
        return self._last

    def unget(self) -> None:
        """Read the last character again."""
        self._again = True
        if not self.is_open:
            self._text = self._text[:-1]

    def get_solid(self) -> Text:
        """The next character that is no white space."""
        while (character := (yield from self.get())).isspace():
            pass
        return character

    def before(self, character: str) -> Steps:
        """Skip what is in front of this character."""
        while (yield from self.get()) != character:
            pass
        self.unget()

    def begin(self, name: str) -> None:
        """A call: nothing that was read for it is content any more."""
        self._join()
        self._events.append(Call(name))
        self.num_calls += 1
        self.is_open, self._text = True, ""

    def drop(self) -> None:
        """What was read is over."""
        self.is_open, self._text = False, ""

    def give_back(self) -> None:
        """What was read is content."""
        self._emit(Content, self._text)
        self._text = ""

    def content(self, markers: tuple[str, ...], first: tuple[str, ...] = ()) -> Text:
        """Content up to one of `markers`, which is returned; `first` count before any content."""
        while True:
            yield from self.get()
            while self._text:
                start = self._text.lstrip()
                possible = [one for one in (*markers, *first) if one.startswith(start)]
                if start in possible:
                    return start
                if possible and len(self._text) - len(start) <= MAX_SPACE:
                    break
                if not self._text[0].isspace():
                    first = ()
                self._emit(Content, self._text[0])
                self._text = self._text[1:]

    def until(self, end: str) -> Text:
        """The text before `end`, which is read as well."""
        text = ""
        while not text.endswith(end):
            text += yield from self.get()
        return text.removesuffix(end)

    def call(self, known: bool = False) -> Steps:
        """One object with a name and arguments; with `known` the name must be a function's."""
        if (yield from self.get_solid()) != "{":
            raise _Malformed
        name: str | None = None
        early: str | None = None  # arguments that came before the name
        told = False
        while (found := (yield from self.get_solid())) != "}":
            if found == ",":
                continue
            self.unget()
            key = yield from self._string()
            if (yield from self.get_solid()) != ":":
                raise _Malformed
            if key in _NAMES and name is None:
                name = yield from self._string()
                if known and name not in self.names:
                    raise _Malformed
                self.begin(name)
            elif key in _ARGUMENTS and not told:
                told, early = True, (yield from self.arguments(name is not None))
            elif name is None and key not in _HARMLESS:
                raise _Malformed
            else:
                yield from self.value(lambda text: None)
        if name is None:
            raise _Malformed
        if early is not None or not told:
            self._emit(Arguments, early or "{}")

    def arguments(self, now: bool) -> Generator[None, str, str | None]:
        """A value, emitted as it comes if `now`, else returned. Some models write the JSON of
        arguments as a string: then it is what the string says."""
        quoted = (yield from self.get_solid()) == '"'
        self.unget()
        if quoted:
            text = yield from self._string()
        elif now:
            yield from self.value(lambda text: self._emit(Arguments, text))
            return None
        else:
            parts: list[str] = []
            yield from self.value(parts.append)
            text = "".join(parts)
        if not now:
            return text
        self._emit(Arguments, text)
        return None

    def value(self, take: Callable[[str], None]) -> Steps:
        """One value of JSON, character by character."""
        character = yield from self.get_solid()
        take(character)
        if character == '"':
            yield from self._rest_of_string(take)
        elif character in _CLOSING:
            yield from self._rest_of_container(_CLOSING[character], take)
        else:
            while (character := (yield from self.get())) not in ",}]" and not character.isspace():
                take(character)
            self.unget()

    def _rest_of_container(self, end: str, take: Callable[[str], None]) -> Steps:
        ends = [end]
        while ends:
            character = yield from self.get()
            take(character)
            if character == '"':
                yield from self._rest_of_string(take)
            elif character in _CLOSING:
                ends.append(_CLOSING[character])
            elif character in "}]" and character != ends.pop():
                raise _Malformed

    def _rest_of_string(self, take: Callable[[str], None]) -> Steps:
        while True:
            character = yield from self.get()
            take(character)
            if character == '"':
                return
            if character == "\\":
                take((yield from self.get()))

    def _string(self) -> Text:
        if (yield from self.get_solid()) != '"':
            raise _Malformed
        parts = ['"']
        yield from self._rest_of_string(parts.append)
        try:
            text = json.loads("".join(parts), strict=False)
        except ValueError:
            raise _Malformed from None
        return str(text)


def attempt(parser: ToolParser, steps: Steps) -> Generator[None, str, bool]:
    """A call, or what would be one: that is content, and the answer False."""
    try:
        yield from steps
    except _Malformed:
        if not parser.is_open:
            parser.give_back()
            return False
    parser.drop()
    return True


# ---- how models write them


def hermes(parser: ToolParser) -> Steps:
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, as Hermes and Qwen do."""
    while True:
        marker = yield from parser.content(("<tool_call>", "</tool_call>"))
        if marker == "<tool_call>":
            yield from attempt(parser, parser.call())
        else:
            parser.drop()


def llama3(parser: ToolParser) -> Steps:
    """{"name": ..., "parameters": {...}}, the whole answer or behind <|python_tag|>; several are
    divided by semicolons."""
    tag = "<|python_tag|>"
    first: tuple[str, ...] = ("{",)
    while True:
        marker = yield from parser.content((tag,), first)
        if marker == ";":
            parser.drop()
            first = ("{",)
            continue
        if marker == "{":
            parser.unget()
        done = yield from attempt(parser, parser.call(known=True))
        first = (";",) if done else ()


def mistral(parser: ToolParser) -> Steps:
    """[TOOL_CALLS] and a list of objects, or, since 2025, a name, [ARGS] and the arguments."""
    while True:
        yield from parser.content(("[TOOL_CALLS]",))
        yield from attempt(parser, _mistral_calls(parser))


def _mistral_calls(parser: ToolParser) -> Steps:
    if (yield from parser.get_solid()) == "[":
        while (character := (yield from parser.get_solid())) != "]":
            if character != ",":
                parser.unget()
                yield from parser.call()
                parser.drop()
        return
    parser.unget()
    name = ""
    while (character := (yield from parser.get())) not in "[{":
        name += character
    parser.unget()
    if character == "[":
        while (yield from parser.until("]")) != "[ARGS":
            yield from parser.before("[")  # an id, which is ours to give
    yield from named(parser, name)


def deepseek(parser: ToolParser) -> Steps:
    """A block of calls in marks of their own; V3 has the arguments in a fence, V3.1 has not."""
    begin, end = DEEPSEEK_CALL
    while True:
        marker = yield from parser.content((*DEEPSEEK_CALLS, begin, end))
        if marker == begin:
            yield from attempt(parser, _deepseek_call(parser))
        else:
            parser.drop()


def _deepseek_call(parser: ToolParser) -> Steps:
    name = yield from parser.until(DEEPSEEK_SEPARATOR)
    plain = (yield from parser.get_solid()) == "{"
    parser.unget()
    if not plain:
        name = yield from parser.until("\n")
        yield from parser.before("{")
    yield from named(parser, name)
    yield from parser.until(DEEPSEEK_CALL[1])


def named(parser: ToolParser, name: str) -> Steps:
    """A call whose name is known, and its arguments."""
    if not name.strip():
        raise _Malformed
    parser.begin(name.strip())
    yield from parser.arguments(now=True)


DEEPSEEK_CALLS = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
DEEPSEEK_CALL = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
DEEPSEEK_SEPARATOR = "<｜tool▁sep｜>"
STYLES: dict[str, Callable[[ToolParser], Steps]] = {
    "hermes": hermes,
    "llama3_json": llama3,
    "mistral": mistral,
    "deepseek": deepseek,
}
