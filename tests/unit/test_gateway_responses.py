"""/v1/responses over a scripted server, asked by OpenAI's own SDK."""

from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from nodeserve.gateway.response_asked import response_of
from nodeserve.gateway.shapes import compact
from nodeserve.text import Tokenizer
from nodeserve.wire.messages import Abort, Submit, unpack_ids
from tests.fakes.gateway import http_client
from tests.fakes.server import FakeServer, Peer, endless, saying
from tests.unit.test_gateway import client, http
from tests.unit.test_gateway_asked import refused

__all__ = ["client", "http"]  # fixtures


def asked_of(server: FakeServer) -> str:
    """The text of the last prompt."""
    ids = unpack_ids(server.submits[-1].token_ids)
    return Tokenizer.load(str(server.about["tokenizer"])).decode(ids)


def cut_off(text: str) -> Any:
    """Answers with this text, and as one that has reached its limit."""

    async def script(peer: Peer, submit: Submit) -> None:
        peer.tokens(submit.request_id, list(text.encode()))
        peer.end(submit, "length", len(text))

    return script


async def test_a_response(server: FakeServer, client: openai.AsyncOpenAI) -> None:
    server.script = saying("Paris é")
    found = await client.responses.create(
        model="fake", input="France?", metadata={"a": "b"}, temperature=0.5
    )
    assert found.output_text == "Paris é" and found.status == "completed"
    assert asked_of(server) == "[user]France?[assistant]"
    assert found.id.startswith("resp_") and found.metadata == {"a": "b"}
    assert (found.temperature, found.top_p, found.incomplete_details) == (0.5, 1.0, None)
    (submit,) = server.submits
    num_prompt = len(submit.token_ids) // 4
    assert submit.sampling == {"max_tokens": 512 - num_prompt, "temperature": 0.5}
    assert found.usage is not None
    counts = (found.usage.input_tokens, found.usage.output_tokens, found.usage.total_tokens)
    assert counts == (num_prompt, 8, num_prompt + 8)


async def test_it_has_the_form_that_the_sdk_describes(server: FakeServer, http: Path) -> None:
    """The SDK itself believes whatever comes; its models, asked to validate, do not."""
    server.script = cut_off("ab")
    async with http_client(http) as client:
        response = await client.post("/v1/responses", json={"input": "x", "max_output_tokens": 2})
    found = Response.model_validate(response.json(), strict=True)
    assert found.status == "incomplete" and found.incomplete_details is not None
    assert found.incomplete_details.reason == "max_output_tokens"
    assert found.max_output_tokens == 2 and found.output_text == "ab"


async def test_instructions_and_messages(server: FakeServer, client: openai.AsyncOpenAI) -> None:
    text: Any = {"type": "input_text", "text": "two"}
    said: Any = {"type": "output_text", "text": "one"}
    await client.responses.create(
        model="fake",
        instructions="Be brief.",
        input=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": "a"},
            {"type": "message", "role": "assistant", "content": [said, said]},
            {"role": "user", "content": [text]},
        ],
    )
    assert asked_of(server) == (
        "[system]Be brief.[system]Be kind.[user]a[assistant]one\none[user]two[assistant]"
    )


async def test_a_stream(server: FakeServer, client: openai.AsyncOpenAI) -> None:
    server.script = saying('é "x"')
    stream = await client.responses.create(model="fake", input="x", stream=True)
    events = [event async for event in stream]
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == 'é "x"'
    last = events[-1]
    assert last.type == "response.completed" and last.response.output_text == 'é "x"'
    assert last.response.usage is not None and last.response.usage.output_tokens == 6


async def test_the_sdks_own_stream_helper(server: FakeServer, client: openai.AsyncOpenAI) -> None:
    server.script = saying("abc")
    async with client.responses.stream(model="fake", input="x") as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert kinds[-1] == "response.completed" and final.output_text == "abc"


async def test_a_stop_string(server: FakeServer, client: openai.AsyncOpenAI) -> None:
    server.script = saying("abc END")
    found = await client.responses.create(model="fake", input="x", extra_body={"stop": " END"})
    assert (found.output_text, found.status) == ("abc", "completed")


async def test_an_error_in_a_stream(server: FakeServer, client: openai.AsyncOpenAI) -> None:
    async def script(peer: Peer, submit: Submit) -> None:
        await endless(peer, submit)
        peer.end(submit, "error", 1, "worker_lost", "worker 1 ended")

    server.script = script
    stream = await client.responses.create(model="fake", input="x", stream=True)
    last = [event async for event in stream][-1]
    assert last.type == "response.failed" and last.response.status == "failed"
    assert last.response.error is not None
    assert (last.response.error.code, last.response.error.message) == (
        "server_error",
        "worker 1 ended",
    )
    assert last.response.output_text == "a"


async def test_a_client_that_leaves(server: FakeServer, client: openai.AsyncOpenAI) -> None:
    server.script = endless
    stream = await client.responses.create(model="fake", input="x", stream=True)
    await anext(aiter(stream))
    await stream.close()
    await server.until_received(Abort)


async def test_what_is_not_there_is_a_404(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve("resp_1")


def response(**body: Any) -> Any:
    return response_of({"input": "x", **body}, {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("input", None), ("input", []), ("input", 5), ("instructions", 5), ("metadata", 5)],
        *[("max_output_tokens", 0), ("previous_response_id", "resp_1"), ("tools", [{}])],
        *[("background", True), ("conversation", "c"), ("include", ["x"]), ("truncation", "auto")],
        *[("prompt", {"id": "p"}), ("reasoning", {"effort": "low"}), ("n", 2)],
        *[("text", "json"), ("top_logprobs", 3)],
        *[
            ("tool_choice", "required"),
            ("temperature", -1.0),
            ("metadata", {str(i): "" for i in range(17)}),
        ],
    ],
)
def test_what_is_refused_is_named(name: str, value: Any) -> None:
    assert refused(response, **{name: value}) == name


@pytest.mark.parametrize("nothing", [None, {}, {"format": None}, {"verbosity": "medium"}])
def test_a_text_that_may_be_any(nothing: Any) -> None:
    found = response(text=nothing)
    assert "constraint" not in found.sampling
    assert found.repeated["text"] == {"format": {"type": "text"}}


@pytest.mark.parametrize(
    ("text", "others", "name"),
    [
        ({"format": "json"}, {}, "text.format"),
        ({"format": {}}, {}, "text.format.type"),
        ({"format": {"type": "json_schema", "name": "n"}}, {}, "text.format.schema"),
        ({"format": {"type": "json_schema", "schema": "x"}}, {}, "text.format.schema"),
        ({"verbosity": "low"}, {}, "text.verbosity"),
        ({"format": {"type": "json_object"}}, {"guided_regex": "a"}, "guided_regex"),
        (
            {"format": {"type": "json_object"}},
            {"response_format": {"type": "json_object"}},
            "text.format",
        ),
    ],
)
def test_what_is_wrong_in_a_format_is_named(text: Any, others: Any, name: str) -> None:
    assert refused(response, text=text, **others) == name


async def test_a_format_travels_and_comes_back(
    server: FakeServer, client: openai.AsyncOpenAI
) -> None:
    server.script = saying('{"a": 1}')
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form: Any = {"type": "json_schema", "name": "n", "strict": True, "schema": schema}
    found = await client.responses.create(model="fake", input="x", text={"format": form})
    assert found.text is not None and found.text.format is not None
    assert found.text.format.model_dump(by_alias=True, exclude_none=True) == form
    (submit,) = server.submits
    assert submit.sampling["constraint"] == {"json_schema": compact(schema)}
    form["schema"] = {"type": "array", "uniqueItems": True}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
        await client.responses.create(model="fake", input="x", text={"format": form})
    assert caught.value.param == "text.format.schema"


@pytest.mark.parametrize(
    ("item", "name"),
    [
        (5, "input[1]"),
        ({"type": "function_call_output"}, "input[1].type"),
        ({"role": "tool", "content": "x"}, "input[1].role"),
        ({"role": ["user"], "content": "x"}, "input[1].role"),
        ({"role": "user"}, "input[1].content"),
        ({"role": "user", "content": [5]}, "input[1].content[0].type"),
        ({"role": "user", "content": [{"type": "input_image"}]}, "input[1].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "input[1].content[0].text"),
    ],
)
def test_what_is_wrong_in_a_message_is_named(item: Any, name: str) -> None:
    assert refused(response, input=[{"role": "user", "content": "x"}, item]) == name


def test_metadata_are_texts() -> None:
    assert refused(response, metadata={"a": 5}) == "metadata.a"
    assert refused(response, metadata={"a" * 65: ""}) == "metadata"
