"""/openapi.json says what the gateway does: its routes, what it reads, what it answers."""

import json
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from starlette.routing import Route

from nodeserve.errors import InvalidRequest
from nodeserve.gateway import gate, openapi
from nodeserve.gateway.answer_schemas import CALL_PART
from nodeserve.gateway.asked import Asked, chat_of, completion_of
from nodeserve.gateway.response_asked import response_of
from nodeserve.gateway.routes import Routes
from nodeserve.gateway.settings import GatewaySettings
from nodeserve.gateway.tool_shape import delta_of
from nodeserve.text.chat import checked_messages
from nodeserve.text.tools import Tool, style_of
from nodeserve.types import check_priority, check_sampling, sampling_from
from nodeserve.wire.messages import pack_ids
from tests.fakes.gateway import events_of, gateway_on, http_client
from tests.fakes.server import FakeServer, saying

Read = Callable[[Mapping[str, Any], Mapping[str, str]], Asked]
OPERATIONS = {one.name: one for one in openapi.OPERATIONS}
READERS: list[tuple[str, Read, dict[str, Any]]] = [
    ("completions", completion_of, {"prompt": "x"}),
    ("chat", chat_of, {"messages": [{"role": "user", "content": "x"}]}),
    ("responses", response_of, {"input": "x"}),
]
SCHEMAS: list[Any] = [{}, True, "x", None]
TOOL = {"type": "function", "function": {"name": "x"}}
FUNCTIONS: list[Any] = [
    *({"name": "x"}, {"name": ""}, {"name": "x y"}, {"name": "x" * 64}, {"name": "x" * 65}),
    *({"name": "x", "description": 1}, {"name": "x", "parameters": {"type": "array"}}),
    *({"name": "x", "parameters": []}, {"name": "x", "parameters": {"type": "object"}}),
    *({"name": "x", "parameters": {}}, {"name": "x", "parameters": None}, {}, None, 5),
]
PROBES: list[Any] = [
    *(None, True, False, 0, 1, 2, -1, 5, 21, 65, 129, 2**31, 2**63, 0.5, -0.5, 1.5, -3.5, 101.5),
    *("", "x", "none", [], [""], ["x"], ["x"] * 65, [5], [5, "x"], [[5]], [[]], [True], [2**31]),
    *({}, {"5": 1.0}, {"5": 101}, {"5": "x"}, {"include_usage": True}, {"include_usage": 1}),
    *({"type": "text"}, {"messages": 1}, [{"role": "user", "content": "x"}], [{"role": "user"}]),
    *([{"role": "", "content": "x"}], [{"role": "user", "content": [{"type": "text"}]}]),
    *([{"role": "user", "content": [{"type": "text", "text": "x"}]}], [{}], [None], [1024] * 1025),
    *([{"type": "message", "role": "developer", "content": "x"}], [{"type": "reasoning"}]),
    *([{"role": "user", "content": [{"type": "input_text", "text": "x"}]}], {"a": "x" * 513}),
    *([{"role": "user", "content": [{"type": "input_image", "text": "x"}]}], {"a": "x"}),
    *({"type": "json_object"}, {"type": "json_schema"}, {"type": "xml"}, {"json_object": True}),
    *({"type": "json_schema", "json_schema": {"schema": one}} for one in SCHEMAS),
    *({"json_object": 1}, {"regex": "a"}, {"regex": ""}, {"regex": False}, {"choice": []}),
    *({"choice": ["a"]}, {"choice": [1]}, {"json": {}}, {"json": 5}, {"json": "{}"}),
    *({"grammar": "x"}, {"structural_tag": "x"}, {"disable_any_whitespace": False}),
    *({"disable_any_whitespace": True}, ["x"] * 1025, "auto", "required"),
    *([{"type": "function", "function": one}] for one in FUNCTIONS),
    *([{"type": "custom", "function": {"name": "x"}}], [{"type": "function"}], [TOOL] * 129),
    *({"type": "function", "function": {}}, {"type": "function", "function": {"name": 1}}),
    *([{"role": "tool", "tool_call_id": "x", "content": "x"}], [{"role": "x", "tool_calls": 1}]),
    *({"format": {"type": "text"}}, {"x" * 65: "x"}, {str(i): "x" for i in range(17)}),
]
# Fields of which a value may be refused for another field's sake, or for the model's vocabulary.
BY_OTHERS = {
    *("best_of", "echo", "logprobs", "max_tokens", "min_tokens", "prompt", "stop_token_ids"),
    *("stream_options", "top_logprobs", "logit_bias", "messages", "tool_choice"),
}
FULL: dict[str, dict[str, Any]] = {
    "completions": {"logprobs": 1, "stream_options": {}},
    "chat": {"logprobs": True, "stream_options": {}},
    "responses": {},
}
HEADERS = {"x-slo-ttft-ms": "5"}


class Watched(dict[str, Any]):
    """A body that knows what it was asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)


def taken(read: Read, body: dict[str, Any]) -> bool:
    """Whether a request with this body is sent to the server."""
    try:
        asked = read(body, HEADERS)
        check_sampling(sampling_from(asked.sampling), 1000)
        check_priority(asked.priority)
        for prompt in asked.prompts:
            pack_ids(prompt if isinstance(prompt, list) else [])
        if asked.messages is not None:
            checked_messages(asked.messages)
    except (InvalidRequest, OverflowError):
        return False
    return True


def test_every_route_is_described() -> None:
    nobody: Any = None
    routes = {
        (route.path.replace(":path}", "}"), method.lower())
        for route in Routes(nobody, GatewaySettings(), nobody).all()
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    paths = openapi.document(False)["paths"]
    assert routes == {(path, method) for path, methods in paths.items() for method in methods}
    assert set(paths) == gate.PATHS | {f"{gate.MODELS}{{name}}"}
    keyless = {
        path
        for path, methods in openapi.document(True)["paths"].items()
        for one in methods.values()
        if "security" not in one
    }
    assert keyless == gate.OPEN_PATHS


def test_schemas_are_schemas() -> None:
    document = openapi.document(True)
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    for one in openapi.OPERATIONS:
        if one.body is not None:
            Draft202012Validator.check_schema(openapi.body_schema(one))
        assert set(one.statuses) <= set(openapi.WORDS)


@pytest.mark.parametrize(("name", "read", "body"), READERS)
def test_no_field_is_read_that_is_not_described(name: str, read: Read, body: Any) -> None:
    watched = Watched({**body, "stream": True, **FULL[name]})
    assert taken(read, watched), "so that nothing is left unread"
    described = openapi.body_schema(OPERATIONS[name])["properties"]
    assert watched.asked == set(described)


@pytest.mark.parametrize(("name", "read", "body"), READERS)
def test_what_is_taken_is_what_is_described(name: str, read: Read, body: Any) -> None:
    """Each field with each probe: both say yes, or both say no."""
    schema = Draft202012Validator(openapi.body_schema(OPERATIONS[name]))
    for field in sorted(schema.schema["properties"]):
        for value in PROBES:
            probe = {**body, field: value}
            ours, described = taken(read, probe), schema.is_valid(probe)
            assert described or not ours, f"{field}: {value!r} is taken and not described"
            assert ours or not described or field in BY_OTHERS, f"{field}: {value!r} is refused"


def validator(name: str | None) -> Draft202012Validator:
    components = openapi.document(False)["components"]
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": components})


@pytest.fixture
async def http(server: FakeServer, tmp_path: Path) -> AsyncIterator[Path]:
    path = tmp_path / "http"
    async with gateway_on(path, GatewaySettings(socket=str(server.path))):
        yield path


async def test_events_are_as_described(server: FakeServer, http: Path) -> None:
    server.script = saying("ab")
    bodies: list[dict[str, Any]] = [
        {"stream": True},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"continuous_usage_stats": True}, "n": 2},
        {"stream": True, "return_token_ids": True},
        {"stream": True, "return_timings": True},
    ]
    async with http_client(http) as client:
        for name, _, body in READERS[:2]:
            one = OPERATIONS[name]
            assert one.events is not None
            for more in bodies:
                response = await client.post(one.path, json={**body, **more})
                assert response.status_code == 200
                for event in events_of(response.content):
                    validator(one.events).validate(event)


async def test_whole_answers_are_as_described(server: FakeServer, http: Path) -> None:
    server.script = saying("ab")
    more = {"return_timings": True, "return_token_ids": True}
    async with http_client(http) as client:
        for name, _, body in READERS[:2]:
            response = await client.post(OPERATIONS[name].path, json={**body, **more})
            assert set(more) & {f"return_{key}" for key in response.json()["choices"][0]} == set(
                more
            )
            validator(OPERATIONS[name].answers).validate(response.json())


CALL = '<tool_call>{"name": "x", "arguments": {"a": 1}}</tool_call>'


@pytest.mark.parametrize("said", [CALL, f"Look: {CALL}", "none"])
async def test_calls_are_as_described(server: FakeServer, http: Path, said: str) -> None:
    server.script = saying(said)
    one = OPERATIONS["chat"]
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL], "logprobs": False}
    async with http_client(http) as client:
        response = await client.post(one.path, json=body)
        assert ("tool_calls" in response.json()["choices"][0]["message"]) == (CALL in said)
        validator(one.answers).validate(response.json())
        response = await client.post(one.path, json={**body, "stream": True})
        events = events_of(response.content)
        assert (b"tool_calls" in response.content) == (CALL in said)
        for event in events:
            validator(one.events).validate(event)


def test_parts_of_calls_are_as_described() -> None:
    """However an answer is cut."""
    parser = style_of("").parser([Tool("x", TOOL)])
    parts: list[dict[str, Any]] = []
    for character in CALL:
        delta = delta_of(parser.push(character), parser.num_calls)
        parts += delta.get("tool_calls", [])
    for part in parts:
        Draft202012Validator(CALL_PART).validate(part)
    assert "id" in parts[0] and any("id" not in part for part in parts)


async def test_events_of_responses_are_as_described(server: FakeServer, http: Path) -> None:
    server.script = saying("ab")
    one = OPERATIONS["responses"]
    async with http_client(http) as client:
        response = await client.post(one.path, json={"input": "x", "stream": True})
    *events, rest = response.content.decode().split("\n\n")
    assert rest == "" and len(events) >= 9
    for number, text in enumerate(events):
        name, data = text.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == number
        validator(one.events).validate(event)


async def test_the_document_is_served(http: Path) -> None:
    async with http_client(http) as client:
        assert (await client.get("/openapi.json")).json() == openapi.document(False)
