"""`nodeserve start --http` with the embedded model: OpenAI's SDK gets what our own client gets."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from nodeserve import AsyncClient
from tests.e2e.conftest import served
from tests.fakes.gateway import BASE_URL, http_client, sdk

QUESTION = "The capital of France is"
TALK: list[Any] = [{"role": "user", "content": "Name the largest planet."}]
MODEL = "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The server's own socket, and its gateway's."""
    folder = tmp_path_factory.mktemp("gateway")
    http = folder / "http.sock"
    with served(folder, layout="1p1d", max_model_len=512, http=f"unix:{http}") as socket:
        yield socket, http
    assert not http.exists()


async def test_answers_are_those_of_the_socket(node: tuple[Path, Path]) -> None:
    socket, http = node
    async with AsyncClient(socket) as ours, sdk(http) as theirs:
        known = await ours.generate(QUESTION, max_tokens=12, temperature=0, logprobs=2)
        found = await theirs.completions.create(
            model=MODEL, prompt=QUESTION, max_tokens=12, temperature=0, logprobs=2
        )
        assert found.choices[0].text == known.text and " Paris" in known.text
        assert found.usage is not None and found.usage.completion_tokens == 12
        assert found.choices[0].logprobs is not None and known.logprobs is not None
        assert found.choices[0].logprobs.token_logprobs == [one.logprob for one in known.logprobs]
        assert "".join(found.choices[0].logprobs.tokens or []) == known.text

        spoken = await ours.chat(TALK, max_tokens=12, temperature=0)
        chat = await theirs.chat.completions.create(
            model=MODEL, messages=TALK, max_completion_tokens=12, temperature=0
        )
        assert chat.choices[0].message.content == spoken.text
        stream = await theirs.chat.completions.create(
            model=MODEL, messages=TALK, max_completion_tokens=12, temperature=0, stream=True
        )
        parts = [event.choices[0].delta.content or "" async for event in stream]
        assert "".join(parts) == spoken.text and len(parts) > 6


async def test_seeds_and_several_answers(node: tuple[Path, Path]) -> None:
    async with sdk(node[1]) as client:

        async def texts(seed: int) -> list[str]:
            done = await client.completions.create(
                model=MODEL, prompt="Once", max_tokens=8, n=3, seed=seed, temperature=1.5
            )
            return [choice.text for choice in done.choices]

        first, again, other = await asyncio.gather(texts(5), texts(5), texts(50))
    assert first == again != other
    assert len(set(first)) == 3, "each answer has its own seed"


async def test_a_stop_string_ends_an_answer(node: tuple[Path, Path]) -> None:
    async with sdk(node[1]) as client:
        stream = await client.completions.create(
            model=MODEL, prompt=QUESTION, max_tokens=50, temperature=0, stop="aris", stream=True
        )
        events = [event.choices[0] async for event in stream]
    assert "".join(event.text for event in events) == " P"
    assert events[-1].finish_reason == "stop"


async def test_a_prompt_that_does_not_fit_is_refused_by_name(node: tuple[Path, Path]) -> None:
    async with sdk(node[1]) as client:
        with pytest.raises(openai.BadRequestError, match="600 tokens") as caught:
            await client.completions.create(model=MODEL, prompt=[5] * 600)
    assert caught.value.param == "prompt" and caught.value.code == "prompt_too_long"


def test_the_blocking_sdk_over_a_unix_socket(node: tuple[Path, Path]) -> None:
    transport = httpx2.HTTPTransport(uds=str(node[1]))
    with (
        httpx2.Client(transport=transport) as http,
        openai.OpenAI(base_url=f"{BASE_URL}/v1", api_key="none", http_client=http) as client,
    ):
        stream = client.completions.create(
            model=MODEL, prompt=QUESTION, max_tokens=5, temperature=0, stream=True
        )
        assert "".join(event.choices[0].text for event in stream).startswith(" Paris")


async def test_tokens_there_and_back(node: tuple[Path, Path]) -> None:
    async with http_client(node[1]) as client:
        found = (await client.post("/tokenize", json={"messages": TALK})).json()
        text = (await client.post("/detokenize", json={"tokens": found["tokens"]})).json()
    assert "largest planet" in text["prompt"] and "<|im_start|>" in text["prompt"]
    assert found["max_model_len"] == 512 and found["count"] == len(found["tokens"])


async def test_responses(node: tuple[Path, Path]) -> None:
    asked: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 12}
    question = TALK[0]["content"]
    async with sdk(node[1]) as client:
        chat = await client.chat.completions.create(
            model=MODEL, messages=TALK, max_completion_tokens=12, temperature=0
        )
        whole = await client.responses.create(input=question, **asked)
        assert whole.output_text == chat.choices[0].message.content
        assert whole.usage is not None and whole.usage.output_tokens == 12
        stream = await client.responses.create(input=question, stream=True, **asked)
        events = [event async for event in stream]
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == whole.output_text
    with (
        httpx2.Client(transport=httpx2.HTTPTransport(uds=str(node[1]))) as http,
        openai.OpenAI(base_url=f"{BASE_URL}/v1", api_key="none", http_client=http) as blocking,
    ):
        again = blocking.responses.create(input=question, **asked)
        assert again.output_text == whole.output_text
        parts = list(blocking.responses.create(input=question, stream=True, **asked))
        deltas = [part.delta for part in parts if part.type == "response.output_text.delta"]
        assert len(deltas) > 6 and "".join(deltas) == whole.output_text
