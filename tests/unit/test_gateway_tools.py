"""Functions over HTTP, asked by OpenAI's own SDK: what is sent, and how calls come back."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from nodeserve.gateway.asked import Asked, chat_of
from nodeserve.gateway.problems import BadField
from nodeserve.gateway.settings import GatewaySettings
from nodeserve.text import Tokenizer
from nodeserve.wire.messages import unpack_ids
from tests.fakes.gateway import gateway_on, sdk
from tests.fakes.server import FakeServer, saying
from tests.unit.test_gateway import HELLO, client, http

__all__ = ["client", "http"]  # fixtures
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def function(name: str, **more: Any) -> Any:
    return {"type": "function", "function": {"name": name, "description": "Tells.", **more}}


TOOLS = [function("weather", parameters=CITY), function("now")]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
NOW = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'


def chat(**body: Any) -> Asked:
    return chat_of({"messages": HELLO, **body}, {})


# ---- what is asked


@pytest.mark.parametrize(
    ("body", "told", "allowed", "must", "parallel"),
    [
        ({}, "wn", "wn", False, True),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, "wn", "wn", False, False),
        ({"tool_choice": "required"}, "wn", "wn", True, True),
        ({"tool_choice": function("now")}, "wn", "n", True, False),
    ],
    ids=str,
)
def test_what_may_be_called(
    body: dict[str, Any], told: str, allowed: str, must: bool, parallel: bool
) -> None:
    tooling = chat(tools=TOOLS, **body).tooling
    assert tooling is not None
    assert "".join(tool.name[0] for tool in tooling.tools) == told
    assert "".join(tool.name[0] for tool in tooling.allowed) == allowed
    assert (tooling.must, tooling.parallel) == (must, parallel)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"tools": []},
        {"tools": [], "tool_choice": "auto"},
        {"tool_choice": "none"},
        {"tools": TOOLS, "tool_choice": "none"},
    ],
    ids=str,
)
def test_nothing_may_be_called(body: dict[str, Any]) -> None:
    assert chat(**body) == chat()


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"tools": {"a": 1}}, "tools"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [TOOLS[0], {"type": "custom"}]}, "tools[1].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function.name"),
        ({"tools": [function("two words")]}, "tools[0].function.name"),
        ({"tools": [function('a"b')]}, "tools[0].function.name"),
        ({"tools": [function("x" * 65)]}, "tools[0].function.name"),
        ({"tools": [function("é")]}, "tools[0].function.name"),
        ({"tools": [function("f", description=5)]}, "tools[0].function.description"),
        ({"tools": [function("f", parameters=[1])]}, "tools[0].function.parameters"),
        ({"tools": [function("f", parameters={"type": "array"})]}, "tools[0].function.parameters"),
        ({"tools": [function("f"), function("f")]}, "tools"),
        ({"tools": [function(f"f{i}") for i in range(129)]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": function("f")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": function("later")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_is_named(body: dict[str, Any], name: str) -> None:
    with pytest.raises(BadField) as caught:
        chat(**body)
    assert caught.value.param == name


# ---- what is sent


async def ask(client: openai.AsyncOpenAI, **body: Any) -> Any:
    return await client.chat.completions.create(model="fake", messages=HELLO, tools=TOOLS, **body)


async def test_the_prompt_tells_of_the_functions(
    server: FakeServer, client: openai.AsyncOpenAI
) -> None:
    server.script = saying("Hi")
    await ask(client)
    (submit,) = server.submits
    prompt = Tokenizer.load(str(server.about["tokenizer"])).decode(unpack_ids(submit.token_ids))
    assert prompt.startswith("[system]") and json.dumps(TOOLS[0]) in prompt
    assert "constraint" not in submit.sampling, "a model may call, and need not"


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", ("weather", "now")), (function("now"), ("now",))],
    ids=str,
)
async def test_an_answer_that_must_call_is_constrained(
    server: FakeServer, client: openai.AsyncOpenAI, choice: Any, names: tuple[str, ...]
) -> None:
    server.script = saying(NOW)
    await ask(client, tool_choice=choice)
    grammar = server.submits[0].sampling["constraint"]["grammar"]
    assert all((name in grammar) == (name in names) for name in ("weather", "now"))


async def test_an_answer_in_json_or_a_call(server: FakeServer, client: openai.AsyncOpenAI) -> None:
    server.script = saying("{}")
    done = await ask(client, response_format={"type": "json_object"})
    assert done.choices[0].message.content == "{}"
    grammar = server.submits[0].sampling["constraint"]["grammar"]
    assert grammar.startswith("start: calls | answer\n")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [function("f", parameters={"not": {}})], "tool_choice": "required"}, "tools"),
        (
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
        ),
        ({"tools": TOOLS, "guided_regex": "a"}, "guided_regex"),
        ({"tools": TOOLS, "guided_json": "{"}, "guided_json"),
    ],
    ids=str,
)
async def test_what_cannot_be_followed_is_a_400_and_is_not_sent(
    server: FakeServer, client: openai.AsyncOpenAI, body: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="fake", messages=HELLO, extra_body=body)
    assert caught.value.param == param and not server.submits


async def test_a_conversation_goes_on_with_results(
    server: FakeServer, client: openai.AsyncOpenAI
) -> None:
    server.script = saying(CALL)
    done = await ask(client)
    message = done.choices[0].message
    server.script = saying("It rains.")
    result: Any = {
        "role": "tool",
        "tool_call_id": message.tool_calls[0].id,
        "content": "rain",
    }
    # By now the tools are not needed: the history is about them all the same.
    again = await client.chat.completions.create(model="fake", messages=[*HELLO, message, result])
    assert again.choices[0].message.content == "It rains."
    prompt = Tokenizer.load(str(server.about["tokenizer"])).decode(
        unpack_ids(server.submits[1].token_ids)
    )
    assert '{"name": "weather", "arguments": {"city": "Oslo"}}' in prompt and "rain" in prompt


# ---- what comes back


async def test_a_whole_answer_with_calls(server: FakeServer, client: openai.AsyncOpenAI) -> None:
    server.script = saying(f"Let me look. {CALL}\n{NOW}")
    done = await ask(client)
    choice = done.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look."
    calls = [
        (call.type, call.function.name, call.function.arguments)
        for call in choice.message.tool_calls
    ]
    assert calls == [("function", "weather", '{"city": "Oslo"}'), ("function", "now", "{}")]
    ids = {call.id for call in choice.message.tool_calls}
    assert len(ids) == 2 and all(len(one) == 9 and one.isalnum() for one in ids)


async def test_calls_alone_have_no_content(server: FakeServer, client: openai.AsyncOpenAI) -> None:
    server.script = saying(NOW)
    assert (await ask(client)).choices[0].message.content is None


async def test_an_answer_without_calls_is_as_ever(
    server: FakeServer, client: openai.AsyncOpenAI
) -> None:
    for words in ("  1 < 2 ", ""):
        server.script = saying(words)
        choice = (await ask(client)).choices[0]
        assert (choice.message.content, choice.finish_reason) == (words, "stop")
        assert choice.message.tool_calls is None


async def test_a_stream_brings_calls_in_parts(
    server: FakeServer, client: openai.AsyncOpenAI
) -> None:
    server.script = saying(f"Look: {CALL}\n{NOW}")
    text, calls, reasons, num_parts = "", dict[int, dict[str, str]](), [], 0
    async for event in await ask(client, stream=True, stream_options={"include_usage": True}):
        for choice in event.choices:
            text += choice.delta.content or ""
            reasons.append(choice.finish_reason)
            for part in choice.delta.tool_calls or ():
                if part.id is not None:
                    assert part.index == len(calls) and part.type == "function"
                    calls[part.index] = {"name": part.function.name, "arguments": ""}
                num_parts += 1
                calls[part.index]["arguments"] += part.function.arguments
    assert text == "Look:"
    assert calls == {
        0: {"name": "weather", "arguments": '{"city": "Oslo"}'},
        1: {"name": "now", "arguments": "{}"},
    }
    assert reasons[-1] == "tool_calls" and set(reasons[:-1]) == {None}
    assert num_parts >= 2


async def test_several_answers_in_one_stream(
    server: FakeServer, client: openai.AsyncOpenAI
) -> None:
    server.script = saying(NOW)
    names: dict[int, list[str]] = {}
    async for event in await ask(client, stream=True, n=3, logprobs=False):
        for choice in event.choices:
            for part in choice.delta.tool_calls or ():
                if part.id is not None:
                    names.setdefault(choice.index, []).append(part.function.name)
    assert names == {0: ["now"], 1: ["now"], 2: ["now"]}


async def test_the_sdk_parses_calls(server: FakeServer, client: openai.AsyncOpenAI) -> None:
    """Its own helper, which asks for strict functions and reads their arguments."""
    server.script = saying(CALL)
    strict = function("weather", parameters={**CITY, "additionalProperties": False}, strict=True)
    done = await client.chat.completions.parse(model="fake", messages=HELLO, tools=[strict])
    calls = done.choices[0].message.tool_calls
    assert calls is not None and calls[0].function.parsed_arguments == {"city": "Oslo"}


@pytest.fixture
async def mistral(server: FakeServer, tmp_path: Path) -> AsyncIterator[openai.AsyncOpenAI]:
    path = tmp_path / "mistral"
    settings = GatewaySettings(socket=str(server.path), tool_call_parser="mistral")
    async with gateway_on(path, settings), sdk(path) as client:
        yield client


async def test_another_style_by_name(server: FakeServer, mistral: openai.AsyncOpenAI) -> None:
    server.script = saying('[TOOL_CALLS][{"name": "now", "arguments": {}}]')
    choice = (await ask(mistral)).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls[0].function.name == "now"
