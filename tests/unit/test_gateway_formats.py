"""Fields that say what an answer must be: what is read from them, and which an error names."""

import json
from typing import Any

import openai
import pytest

from nodeserve.gateway.asked import Asked, chat_of, completion_of
from nodeserve.gateway.problems import BadField
from nodeserve.types import MAX_CONSTRAINT_BYTES, Constraint
from tests.fakes.server import FakeServer, saying
from tests.unit.test_gateway import HELLO, client, http

__all__ = ["client", "http"]  # fixtures
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
OBJECT = Constraint("json_schema", '{"type":"object"}')


def completion(**body: Any) -> Asked:
    return completion_of({"prompt": "x", **body}, {})


def chat(**body: Any) -> Asked:
    return chat_of({"messages": HELLO, **body}, {})


def described(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}


@pytest.mark.parametrize("work", [completion, chat])
@pytest.mark.parametrize(
    ("body", "name", "constraint"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format", OBJECT),
        (
            {"response_format": described({"type": "null"})},
            "response_format.json_schema.schema",
            Constraint("json_schema", '{"type":"null"}'),
        ),
        (
            {"structured_outputs": {"json": {"type": "é"}, "json_object": False, "regex": None}},
            "structured_outputs.json",
            Constraint("json_schema", '{"type":"é"}'),
        ),
        (
            {"structured_outputs": {"json_object": True}},
            "structured_outputs.json_object",
            OBJECT,
        ),
        (
            {"structured_outputs": {"choice": ["a", "b"], "disable_any_whitespace": False}},
            "structured_outputs.choice",
            Constraint("grammar", 'start: "a" | "b"'),
        ),
        ({"guided_json": '{"a": 1}'}, "guided_json", Constraint("json_schema", '{"a": 1}')),
        ({"guided_regex": "a+"}, "guided_regex", Constraint("regex", "a+")),
        (
            {"guided_grammar": 'start: "a"'},
            "guided_grammar",
            Constraint("grammar", 'start: "a"'),
        ),
    ],
    ids=str,
)
def test_each_field_is_read(
    work: Any, body: dict[str, Any], name: str, constraint: Constraint
) -> None:
    asked = work(**body)
    assert (asked.constraint_field, asked.sampling["constraint"]) == (name, constraint)


@pytest.mark.parametrize("nothing", [None, {"type": "text"}])
def test_text_is_no_constraint(nothing: Any) -> None:
    assert chat(response_format=nothing, structured_outputs={}).sampling == chat().sampling


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": described("x")}, "response_format.json_schema.schema"),
        ({"structured_outputs": []}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"guided_choice": "a"}, "guided_choice"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
    ],
    ids=str,
)
@pytest.mark.parametrize("work", [completion, chat])
def test_a_wrong_one_is_named(work: Any, body: dict[str, Any], name: str) -> None:
    with pytest.raises(BadField) as caught:
        work(**body)
    assert caught.value.param == name


async def test_it_travels_as_text(server: FakeServer, client: openai.AsyncOpenAI) -> None:
    server.script = saying('{"a": 1}')
    done = await client.chat.completions.create(
        model="fake",
        messages=HELLO,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
    )
    assert done.choices[0].message.content == '{"a": 1}'
    (submit,) = server.submits
    ((kind, text),) = submit.sampling["constraint"].items()
    assert kind == "json_schema" and json.loads(text) == SCHEMA


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": described({"type": "x"})}, "response_format.json_schema.schema"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": "a" * (MAX_CONSTRAINT_BYTES + 1)}, "guided_regex"),
        ({"guided_grammar": "start: ("}, "guided_grammar"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"guided_regex": "a", "min_tokens": 2}, "min_tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_cannot_be_compiled_is_a_400_and_is_not_sent(
    server: FakeServer, client: openai.AsyncOpenAI, body: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="fake", prompt="x", max_tokens=5, extra_body=body)
    assert caught.value.param == param and not server.submits
