"""Chats whose answers may call functions: the calls found in the text, in OpenAI's form."""

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nodeserve.client import Chunk, Completion
from nodeserve.gateway.asked import Asked
from nodeserve.gateway.shapes import ChatShape, Choice, compact
from nodeserve.text.tool_parser import Arguments, Call, Content, Event, ToolParser

CALLED = "tool_calls"  # why an answer ended
ID_CHARACTERS = 9  # of a call; templates of Mistral's want just these, of letters and digits
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


class ToolShape(ChatShape):
    """/v1/chat/completions with tools."""

    def __init__(self, asked: Asked, request_id: str, model: str, created_s: int) -> None:
        super().__init__(asked, request_id, model, created_s)
        self._parsers: dict[int, ToolParser] = {}  # by the choice's index

    def events(self, choice: Choice, chunk: Chunk) -> bytes:
        parser = self._parser(choice)
        found = parser.push(chunk.text)
        if chunk.finish_reason is not None:
            found += parser.finish()
        delta = delta_of(found, parser.num_calls)
        told = self.asked.token_ids or self.asked.continuous_usage or chunk.logprobs is not None
        first = "" if choice.begun else self.first(choice)
        choice.begun = True
        choice.num_tokens += len(chunk.token_ids)
        if not (delta or told or chunk.finish_reason is not None):
            return first.encode()
        if chunk.finish_reason == "stop" and parser.num_calls:
            chunk = replace(chunk, finish_reason=CALLED)
        text = f'{self._head}{{"index":{choice.index},"delta":{compact(delta)}'
        return f"{first}{text}{self._rest(choice, chunk)}".encode()

    def _whole(self, choice: Choice, done: Completion) -> dict[str, Any]:
        shown = super()._whole(choice, done)
        parser = self._parser(choice)
        delta = delta_of([*parser.push(done.text), *parser.finish()], parser.num_calls)
        message = {"role": "assistant", "content": delta.get("content"), "refusal": None}
        if calls := delta.get("tool_calls"):
            message["tool_calls"] = [without_index(call) for call in calls]
            if done.finish_reason == "stop":
                shown["finish_reason"] = CALLED
        elif message["content"] is None:
            message["content"] = ""
        return {**shown, "message": message}

    def _parser(self, choice: Choice) -> ToolParser:
        if choice.index not in self._parsers:
            assert self.style is not None and self.asked.tooling is not None
            self._parsers[choice.index] = self.style.parser(self.asked.tooling.tools)
        return self._parsers[choice.index]


def delta_of(events: Sequence[Event], num_calls: int) -> dict[str, Any]:
    """What these events add to an answer that has `num_calls` calls by their end."""
    content: list[str] = []
    calls: list[dict[str, Any]] = []
    index = num_calls - sum(isinstance(event, Call) for event in events) - 1
    for event in events:
        match event:
            case Content(text):
                content.append(text)
            case Call(name):
                index += 1
                calls.append(begun(index, name))
            case Arguments(text):
                if not calls:
                    calls.append({"index": index, "function": {"arguments": ""}})
                calls[-1]["function"]["arguments"] += text
    delta: dict[str, Any] = {"content": "".join(content)} if content else {}
    return {**delta, "tool_calls": calls} if calls else delta


def begun(index: int, name: str) -> dict[str, Any]:
    call_id = "".join(secrets.choice(ALPHABET) for _ in range(ID_CHARACTERS))
    function = {"name": name, "arguments": ""}
    return {"index": index, "id": call_id, "type": "function", "function": function}


def without_index(call: dict[str, Any]) -> dict[str, Any]:
    """As whole answers have it."""
    return {name: value for name, value in call.items() if name != "index"}
