"""Answers of a given form from the embedded model: always what the schema allows, on any road."""

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest

from nodeserve import AsyncClient
from nodeserve.errors import InvalidRequest
from tests.e2e.conftest import served
from tests.fakes.gateway import sdk
from tests.fakes.schemas import random_schema
from tests.reference.embedded import needs_embedded_model
from tests.repeats import repeats

pytestmark = [needs_embedded_model, pytest.mark.timeout(400)]

MODEL = "SmolLM2-135M-Instruct"
NUM_SCHEMAS = repeats(25, 100)
WHOLE_S = 380.0  # for all of them at once
MAX_TOKENS = 700  # above what any of the schemas can need with white space everywhere
ROADS: dict[str, dict[str, Any]] = {
    "1m": {"layout": "1m"},
    "1p1d": {"layout": "1p1d", "max_num_batched_tokens": 64},
}
ASKED: list[dict[str, Any]] = [
    *({"constraint": {"json_schema": random_schema(random.Random(seed))}} for seed in range(6)),
    {"constraint": {"regex": "(yes|no), [a-z ]{5,30}"}, "temperature": 1.0, "seed": 3},
    {"constraint": {"json_object": True}, "temperature": 0.8, "seed": 4, "max_tokens": 40},
    {"constraint": {"choice": ["Paris", "Rome"]}, "logprobs": 2, "repetition_penalty": 1.3},
]


class Visit(pydantic.BaseModel):
    city: str = pydantic.Field(max_length=20)
    days: int = pydantic.Field(ge=1, le=14)
    season: Literal["spring", "autumn"]


def talk(words: str) -> list[Any]:
    return [{"role": "user", "content": words}]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The server's own socket, and its gateway's."""
    folder = tmp_path_factory.mktemp("structured")
    http = folder / "http.sock"
    with served(folder, **ROADS["1p1d"], max_model_len=1024, http=f"unix:{http}") as socket:
        yield socket, http


@pytest.mark.repeats
async def test_random_schemas_are_always_met(node: tuple[Path, Path]) -> None:
    """Greedy and drawn ones; half of them as streams."""
    schemas = [random_schema(random.Random(1000 + seed)) for seed in range(NUM_SCHEMAS)]

    async def ask(client: openai.AsyncOpenAI, number: int, schema: Any) -> str:
        options: dict[str, Any] = {
            "model": MODEL,
            "messages": talk("Give me an example, as JSON."),
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "example", "strict": True, "schema": schema},
            },
            "max_completion_tokens": MAX_TOKENS,
            "temperature": (number % 3) / 2,
            "seed": number,
        }
        if number % 2:
            done = await client.chat.completions.create(**options)
            assert done.choices[0].finish_reason == "stop", (schema, done.choices[0])
            return str(done.choices[0].message.content)
        stream = await client.chat.completions.create(**options, stream=True)
        choices = [event.choices[0] async for event in stream]
        assert choices[-1].finish_reason == "stop", schema
        return "".join(choice.delta.content or "" for choice in choices)

    async with sdk(node[1], timeout=WHOLE_S) as client:
        texts = await asyncio.gather(*(ask(client, *each) for each in enumerate(schemas)))
    for schema, text in zip(schemas, texts, strict=True):
        jsonschema.validate(json.loads(text), schema)
    assert len(set(texts)) > NUM_SCHEMAS / 2


async def answers(socket: Path) -> list[tuple[list[int], str | None]]:
    async with AsyncClient(socket) as client:
        found = await asyncio.gather(
            *(
                client.generate(
                    "An example:", **{"max_tokens": MAX_TOKENS, "temperature": 0.0, **one}
                )
                for one in ASKED
            )
        )
    return [(one.token_ids, one.finish_reason) for one in found]


async def test_the_road_does_not_matter(node: tuple[Path, Path], tmp_path: Path) -> None:
    with served(tmp_path, **ROADS["1m"], max_model_len=1024) as socket:
        whole = await answers(socket)
    assert await answers(node[0]) == whole
    reasons = [reason for _, reason in whole]
    assert reasons[:7] == ["stop"] * 7 and reasons[8] == "stop"


async def test_vllms_fields_and_the_library(node: tuple[Path, Path]) -> None:
    async with sdk(node[1]) as theirs, AsyncClient(node[0]) as ours:
        for extra, allowed in (
            ({"guided_choice": ["cat", "dog"]}, {"cat", "dog"}),
            ({"structured_outputs": {"regex": "0[ab]"}}, {"0a", "0b"}),
            ({"guided_grammar": 'root ::= "x" | "y"'}, {"x", "y"}),
        ):
            done = await theirs.completions.create(
                model=MODEL, prompt="Say:", extra_body=extra, max_tokens=9, n=3, temperature=2.0
            )
            assert {choice.text for choice in done.choices} <= allowed
            assert {choice.finish_reason for choice in done.choices} == {"stop"}
        chunks = ours.generate("Say:", constraint={"choice": ["north"]}, stream=True, max_tokens=9)
        assert "".join([chunk.text async for chunk in chunks]) == "north"


@pytest.mark.parametrize("stream", [False, True])
async def test_responses_have_the_form_that_their_text_asks_for(
    node: tuple[Path, Path], stream: bool
) -> None:
    """By the SDK's own way from a class to a schema and back."""
    async with sdk(node[1], timeout=WHOLE_S) as client:

        async def ask(seed: int) -> Visit:
            options: dict[str, Any] = {
                "model": MODEL,
                "input": "Where shall we go, and for how long? Answer in JSON.",
                "text_format": Visit,
                "temperature": 1.0,
                "max_output_tokens": MAX_TOKENS,
                "extra_body": {"seed": seed},
            }
            if not stream:
                done = await client.responses.parse(**options)
            else:
                async with client.responses.stream(**options) as events:
                    done = await events.get_final_response()
            visit = done.output_parsed
            assert done.status == "completed" and isinstance(visit, Visit)
            assert json.loads(done.output_text) == visit.model_dump()
            return visit

        visits = await asyncio.gather(*(ask(seed) for seed in range(6)))
    assert len({visit.model_dump_json() for visit in visits}) > 3


async def test_what_cannot_be_followed_is_refused_by_name(node: tuple[Path, Path]) -> None:
    async with sdk(node[1]) as client, AsyncClient(node[0]) as ours:
        with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
            await client.chat.completions.create(
                model=MODEL,
                messages=talk("x"),
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "array", "uniqueItems": True}},
                },
            )
        assert caught.value.param == "response_format.json_schema.schema"
        with pytest.raises(InvalidRequest, match="unclosed"):
            await ours.generate("x", constraint={"regex": "("})


async def test_a_worker_refuses_what_nobody_looked_at(
    node: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As clients in other languages may send it; others of the same step do not notice."""
    monkeypatch.setattr("nodeserve.client.aio.check", lambda constraint: None)
    async with AsyncClient(node[0]) as client:
        good = asyncio.create_task(client.generate("x", max_tokens=5, temperature=0))
        with pytest.raises(InvalidRequest, match="unclosed"):
            await client.generate("x", constraint={"regex": "("}, max_tokens=5)
        assert len((await good).token_ids) == 5
        assert not (await client.audit()).problems


# ---- functions

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": name, "description": "Tells about a city.", "parameters": CITY},
    }
    for name in ("weather", "history")
]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_must_call_calls(node: tuple[Path, Path], stream: bool) -> None:
    """Whatever the model would rather say; drawn, so that many ways are taken."""
    async with sdk(node[1]) as client:

        async def ask(seed: int, choice: Any) -> list[tuple[str, str]]:
            options: dict[str, Any] = {
                "model": MODEL,
                "messages": talk("How is the weather in Oslo this week?"),
                "tools": TOOLS,
                "tool_choice": choice,
                "seed": seed,
                "temperature": 1.0,
                "parallel_tool_calls": False,
                "max_completion_tokens": 300,
            }
            if not stream:
                done = await client.chat.completions.create(**options)
                assert done.choices[0].finish_reason == "tool_calls"
                calls: Any = done.choices[0].message.tool_calls
                return [(call.function.name, call.function.arguments) for call in calls]
            async with client.chat.completions.stream(**options) as events:
                final = await events.get_final_completion()
            assert final.choices[0].finish_reason == "tool_calls"
            parsed: Any = final.choices[0].message.tool_calls
            return [(call.function.name, call.function.arguments) for call in parsed]

        named = {"type": "function", "function": {"name": "history"}}
        choices = [*(["required"] * 6), named, named]
        found = await asyncio.gather(*(ask(seed, one) for seed, one in enumerate(choices)))
    for calls in found:
        ((name, arguments),) = calls
        assert name in ("weather", "history")
        jsonschema.validate(json.loads(arguments), CITY)
    assert {calls[0][0] for calls in found[6:]} == {"history"}
    assert len({calls[0][1] for calls in found}) > 3


async def test_a_model_may_answer_without_a_call_and_hear_results(node: tuple[Path, Path]) -> None:
    result: list[Any] = [
        *talk("How is the weather in Oslo?"),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "abcdefghi",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Oslo", "days": 1}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "Rain, 7 degrees."},
    ]
    async with sdk(node[1]) as client:
        done = await client.chat.completions.create(
            model=MODEL, messages=result, tools=TOOLS, max_completion_tokens=30, temperature=0
        )
    assert done.choices[0].message.content or done.choices[0].message.tool_calls
    assert done.usage is not None and done.usage.prompt_tokens > 150, "functions are in the prompt"
