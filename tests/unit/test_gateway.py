"""The gateway over a scripted server, asked by OpenAI's own SDK: answers, streams, small routes."""

from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import openai
import pytest

from nodeserve.gateway.settings import GatewaySettings
from nodeserve.text import Tokenizer
from nodeserve.wire.messages import Submit, pack_floats, pack_ids, unpack_ids
from tests.fakes.gateway import events_of, gateway_on, http_client, sdk
from tests.fakes.server import TIMINGS, FakeServer, Peer, saying

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def http(server: FakeServer, tmp_path: Path) -> AsyncIterator[Path]:
    """The socket of a gateway in front of `server`."""
    path = tmp_path / "http"
    async with gateway_on(path, GatewaySettings(socket=str(server.path))):
        yield path


@pytest.fixture
async def client(http: Path) -> AsyncIterator[openai.AsyncOpenAI]:
    async with sdk(http) as client:
        yield client


def tokenizer_of(server: FakeServer) -> Tokenizer:
    return Tokenizer.load(str(server.about["tokenizer"]))


# ---- whole answers


async def test_a_completion(server: FakeServer, client: openai.AsyncOpenAI) -> None:
    server.script = saying("Paris é €")
    done = await client.completions.create(model="fake", prompt="France?", max_tokens=50)
    assert done.choices[0].text == "Paris é €"
    assert done.choices[0].finish_reason == "stop"
    assert done.object == "text_completion" and done.model == "fake"
    assert done.usage is not None and done.usage.completion_tokens == len("Paris é €".encode())
    (submit,) = server.submits
    assert list(unpack_ids(submit.token_ids)) == tokenizer_of(server).encode("France?")
    assert done.usage.prompt_tokens == len(submit.token_ids) // 4
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert submit.sampling == {"max_tokens": 50} and submit.slo is None and submit.priority == 0


async def test_prompts_times_n(server: FakeServer, client: openai.AsyncOpenAI) -> None:
    async def script(peer: Peer, submit: Submit) -> None:
        said = [unpack_ids(submit.token_ids)[0], submit.sampling["seed"]]
        peer.tokens(submit.request_id, said)
        peer.end(submit, "length", 2)

    server.script = script
    done = await client.completions.create(
        model="fake", prompt=[[65], [66, 67]], n=2, seed=48, max_tokens=2
    )
    assert [choice.text for choice in done.choices] == ["A0", "A1", "B0", "B1"]
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (3, 8)


async def test_echo_and_token_ids(server: FakeServer, client: openai.AsyncOpenAI) -> None:
    server.script = saying("b")
    for prompt in ("a", [ord("a")]):
        done = await client.completions.create(
            model="fake", prompt=prompt, echo=True, extra_body={"return_token_ids": True}
        )
        choice: Any = done.choices[0]
        assert choice.text == "ab"
        assert (choice.prompt_token_ids, choice.token_ids) == ([97], [98])


async def test_a_chat(server: FakeServer, client: openai.AsyncOpenAI) -> None:
    server.script = saying("Hi!")
    done = await client.chat.completions.create(model="fake", messages=HELLO)
    assert done.object == "chat.completion"
    message = done.choices[0].message
    assert (message.role, message.content) == ("assistant", "Hi!")
    (submit,) = server.submits
    prompt = list(unpack_ids(submit.token_ids))
    assert tokenizer_of(server).decode(prompt) == "[user]hello[assistant]"
    assert submit.sampling == {"max_tokens": 512 - len(prompt)}, "the rest of the context"


async def test_a_stop_string_never_shows_in_part(
    server: FakeServer, client: openai.AsyncOpenAI
) -> None:
    server.script = saying("abc END de")
    whole = await client.completions.create(model="fake", prompt="x", stop=["END", "zz"])
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("abc ", "stop")
    seen = []
    async for event in await client.completions.create(
        model="fake", prompt="x", stop="END", stream=True
    ):
        seen += [choice.text for choice in event.choices]
    assert "".join(seen) == "abc " and not [text for text in seen if "E" in text]


async def logprobs_script(peer: Peer, submit: Submit) -> None:
    """Two tokens; of the second an alternative that cannot be."""
    top = submit.sampling["logprobs"]
    for chosen, other, value in ((72, 105, -1.5), (0xC3, 33, float("-inf"))):
        ids, values = [chosen, other][:top], [-0.25, value][:top]
        entry = [-0.25, pack_ids(ids), pack_floats(values)]
        peer.tokens(submit.request_id, [chosen], [entry])
    peer.end(submit, "length", 2)


async def test_logprobs_of_completions(server: FakeServer, client: openai.AsyncOpenAI) -> None:
    server.script = logprobs_script
    done = await client.completions.create(model="fake", prompt="x", logprobs=2)
    found = done.choices[0].logprobs
    assert found is not None
    assert found.tokens == ["H", "\ufffd"] and found.token_logprobs == [-0.25, -0.25]
    assert found.top_logprobs == [{"H": -0.25, "i": -1.5}, {"\ufffd": -0.25, "!": -9999.0}]
    assert found.text_offset == [0, 1]
    streamed: list[Any] = []
    async for event in await client.completions.create(
        model="fake", prompt="x", logprobs=2, stream=True
    ):
        streamed += [one.logprobs for one in event.choices if one.logprobs and one.logprobs.tokens]
    assert [token for one in streamed for token in one.tokens] == found.tokens
    assert [offset for one in streamed for offset in one.text_offset] == [0, 1]


async def test_logprobs_of_chats(server: FakeServer, client: openai.AsyncOpenAI) -> None:
    server.script = logprobs_script
    for top in (0, 2):
        done = await client.chat.completions.create(
            model="fake", messages=HELLO, logprobs=True, top_logprobs=top
        )
        logprobs = done.choices[0].logprobs
        assert logprobs is not None and logprobs.content is not None
        first, second = logprobs.content
        assert (first.token, first.bytes, first.logprob) == ("H", [72], -0.25)
        assert (second.token, second.bytes) == ("\ufffd", [0xC3])
        assert [one.token for one in first.top_logprobs] == ["H", "i"][:top]
    by_id = await client.chat.completions.create(
        model="fake",
        messages=HELLO,
        logprobs=True,
        extra_body={"return_tokens_as_token_ids": True},
    )
    assert by_id.choices[0].logprobs is not None and by_id.choices[0].logprobs.content is not None
    assert [one.token for one in by_id.choices[0].logprobs.content] == [
        "token_id:72",
        "token_id:195",
    ]


# ---- streams


async def test_a_stream_of_chat(server: FakeServer, http: Path, client: openai.AsyncOpenAI) -> None:
    text = 'né "quoted" \\ \u2028 \x1f 🎉'
    server.script = saying(text)
    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(
            model="fake", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    ]
    *parts, last = chunks
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text
    assert [part.choices[0].finish_reason for part in parts if part.choices[0].finish_reason] == [
        "stop"
    ]
    assert last.choices == [] and last.usage is not None
    assert last.usage.completion_tokens == len(text.encode())
    assert len({chunk.id for chunk in chunks}) == 1
    assert {part.usage for part in parts} == {None}


async def test_usage_comes_only_when_asked_for(server: FakeServer, http: Path) -> None:
    server.script = saying("ab")
    body: dict[str, Any] = {"prompt": "x", "stream": True}
    async with http_client(http) as client:
        plain = await client.post("/v1/completions", json=body)
        assert plain.headers["content-type"].startswith("text/event-stream")
        assert all("usage" not in event for event in events_of(plain.content))
        body["stream_options"] = {"continuous_usage_stats": True}
        each = await client.post("/v1/completions", json=body)
    counts = [event["usage"]["completion_tokens"] for event in events_of(each.content)]
    assert counts[-1] == 2 and counts == sorted(counts)


async def test_a_stream_of_several_answers(server: FakeServer, http: Path) -> None:
    server.script = saying("ab")
    body = {
        **{"prompt": ["x", "y"], "n": 2, "stream": True, "echo": True, "return_token_ids": True},
        "stream_options": {"include_usage": True},
    }
    async with http_client(http) as client:
        response = await client.post("/v1/completions", json=body)
    texts, ids = [""] * 4, [[], [], [], []]  # type: list[str], list[list[int]]
    *parts, last = events_of(response.content)
    for event in parts:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
        ids[choice["index"]] += choice.get("token_ids", [])
    assert texts == ["xab", "xab", "yab", "yab"] and ids == [[97, 98]] * 4
    assert last["usage"] == {"prompt_tokens": 2, "completion_tokens": 8, "total_tokens": 10}


async def test_times_come_with_each_answer_when_asked_for(
    server: FakeServer, http: Path, client: openai.AsyncOpenAI
) -> None:
    server.script = saying("ab")
    asked: dict[str, Any] = {"return_timings": True}
    done = await client.completions.create(model="fake", prompt="x", n=2, extra_body=asked)
    assert [choice.model_extra for choice in done.choices] == [{"timings": asdict(TIMINGS)}] * 2
    stream = await client.chat.completions.create(
        model="fake", messages=HELLO, n=2, stream=True, extra_body=asked
    )
    told = [
        (one.index, one.finish_reason, one.model_extra["timings"])
        async for event in stream
        for one in event.choices
        if one.model_extra
    ]
    assert sorted(told) == [(number, "stop", asdict(TIMINGS)) for number in range(2)]
    body = {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}}
    async with http_client(http) as plain:
        for more in (body, {"prompt": "x"}):
            response = await plain.post("/v1/completions", json=more)
            assert b"timings" not in response.content


# ---- what surrounds an answer


async def test_headers_reach_the_server_and_come_back(
    server: FakeServer, client: openai.AsyncOpenAI
) -> None:
    given = {"x-slo-ttft-ms": "250", "x-slo-tpot-ms": "30", "x-request-id": "my-id/5"}
    raw = await client.completions.with_raw_response.create(
        model="fake", prompt="x", extra_headers=given, extra_body={"priority": 3}
    )
    assert raw.headers["x-request-id"] == "my-id/5"
    assert raw.parse().id == "cmpl-my-id/5"
    (submit,) = server.submits
    assert submit.slo == {"ttft_ms": 250.0, "tpot_ms": 30.0} and submit.priority == -3
    other = await client.completions.with_raw_response.create(
        model="fake", prompt="x", extra_headers={"x-request-id": "two words"}
    )
    assert len(other.headers["x-request-id"]) == 32, "one that cannot be repeated is replaced"


async def test_models(client: openai.AsyncOpenAI) -> None:
    (listed,) = [model async for model in await client.models.list()]
    assert listed.id == "fake" and listed.owned_by == "nodeserve"
    one = await client.models.retrieve("fake")
    assert one == listed and one.model_dump()["max_model_len"] == 512
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        await client.models.retrieve("other")


async def test_tokenize_and_back(server: FakeServer, http: Path) -> None:
    tokenizer = tokenizer_of(server)
    async with http_client(http) as client:
        text = "hello wörld"
        found = (await client.post("/tokenize", json={"prompt": text})).json()
        assert found["tokens"] == tokenizer.encode(text) and found["max_model_len"] == 512
        assert found["count"] == len(found["tokens"]) and found["token_strs"] is None
        back = await client.post("/detokenize", json={"tokens": found["tokens"]})
        assert back.json() == {"prompt": text}
        chat = {"messages": HELLO, "return_token_strs": True, "add_generation_prompt": False}
        shown = (await client.post("/tokenize", json=chat)).json()
        assert "".join(shown["token_strs"]) == "[user]hello[assistant]"  # of this template, always
        special = await client.post("/detokenize", json={"tokens": [tokenizer.eos_token_id]})
        assert special.json() == {"prompt": "<eos>"}
        for path, body in (("/tokenize", {}), ("/detokenize", {"tokens": "x"})):
            assert (await client.post(path, json=body)).status_code == 400


async def test_long_texts_are_tokenized_beside_the_loop(
    server: FakeServer, client: openai.AsyncOpenAI
) -> None:
    server.about["max_model_len"] = 100_000
    text = "hello " * 4000
    await client.completions.create(model="fake", prompt=text)
    (submit,) = server.submits
    assert list(unpack_ids(submit.token_ids)) == tokenizer_of(server).encode(text)


async def test_probes_and_version(server: FakeServer, http: Path) -> None:
    async with http_client(http) as client:
        for path in ("/live", "/ready", "/health", "/version"):
            assert (await client.get(path)).status_code == 200
        server.health = {"state": "stopping", "ready": False, "reasons": ["it was told to"]}
        for path in ("/ready", "/health"):
            response = await client.get(path)
            assert response.status_code == 503
            error = response.json()["error"]
            assert error["code"] == "not_ready"
            assert error["message"] == "the server is stopping: it was told to"
        assert (await client.get("/live")).status_code == 200
