"""What is read from a request's JSON, and which field an error names."""

from typing import Any

import pytest

from nodeserve.errors import InvalidRequest
from nodeserve.gateway.asked import (
    NOT_IN_CHATS,
    NOT_IN_COMPLETIONS,
    Asked,
    chat_of,
    completion_of,
)
from nodeserve.gateway.fields import json_object
from nodeserve.gateway.problems import BadField, param_of
from nodeserve.types import check_sampling, sampling_from

MESSAGES = [{"role": "user", "content": "x"}]


def completion(headers: dict[str, str] | None = None, **body: Any) -> Asked:
    return completion_of({"prompt": "x", **body}, headers or {})


def chat(headers: dict[str, str] | None = None, **body: Any) -> Asked:
    return chat_of({"messages": MESSAGES, **body}, headers or {})


def refused(work: Any, **body: Any) -> str:
    """The field that an error names."""
    with pytest.raises(InvalidRequest) as caught:
        asked = work(**body)
        check_sampling(sampling_from(asked.sampling), 100)
    param = param_of(caught.value)
    assert param is not None and str(caught.value).startswith(param)
    return param


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("x", ("x",)),
        (["x", "y"], ("x", "y")),
        ([1, 2], ([1, 2],)),
        ([[1, 2], [3]], ([1, 2], [3])),
        (["x", [3]], ("x", [3])),
    ],
)
def test_prompts(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize("prompt", [None, [], 5, [1, "x"], [[]], [True], [1.5], {"text": "x"}])
def test_prompts_that_are_none(prompt: Any) -> None:
    assert refused(completion, prompt=prompt) == "prompt"


def test_all_that_a_completion_can_say() -> None:
    asked = completion(
        {"x-slo-ttft-ms": "250", "x-slo-tpot-ms": "40.5"},
        **{
            "model": "m",
            "max_tokens": 7,
            "n": 3,
            "best_of": 3,
            "stop": "a",
            "seed": 4,
            "top_k": -1,
        },
        **{"temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "presence_penalty": 1, "min_tokens": 2},
        **{"frequency_penalty": -1, "repetition_penalty": 1.1, "ignore_eos": True, "logprobs": 0},
        **{"stop_token_ids": [9], "logit_bias": {"5": -100}, "priority": 2, "stream": True},
        **{"stream_options": {"include_usage": True}, "return_token_ids": True, "user": "u"},
        return_timings=True,
    )
    assert asked == Asked(
        model="m",
        prompts=("x",),
        sampling={
            **{"max_tokens": 7, "seed": 4, "top_k": 0, "temperature": 0.5, "top_p": 0.9},
            **{"min_p": 0.1, "presence_penalty": 1, "min_tokens": 2, "frequency_penalty": -1},
            **{"repetition_penalty": 1.1, "ignore_eos": True, "logprobs": 0},
            **{"stop_token_ids": [9], "logit_bias": {5: -100}},
        },
        n=3,
        stops=("a",),
        stream=True,
        include_usage=True,
        token_ids=True,
        timings=True,
        priority=-2,  # vLLM's users write low numbers for what is urgent
        slo={"ttft_ms": 250.0, "tpot_ms": 40.5},
    )
    check_sampling(sampling_from(asked.sampling), 100)


def test_defaults_are_openais() -> None:
    assert completion().sampling == {"max_tokens": 16}
    assert chat().sampling == {}, "as long as the context has room"
    assert not chat().stream and chat().n == 1 and chat().slo is None


def test_limits_of_chats() -> None:
    assert chat(max_tokens=5).sampling == {"max_tokens": 5}
    assert chat(max_tokens=5, max_completion_tokens=6).sampling == {"max_tokens": 6}
    assert chat(logprobs=True).sampling == {"logprobs": 0}
    assert chat(logprobs=True, top_logprobs=4).sampling == {"logprobs": 4}
    assert chat(logprobs=False).sampling == {}


def test_unknown_fields_and_nulls_are_nothing() -> None:
    nothing = {"temperature": None, "stop": None, "n": None, "tools": None, "seed": None}
    assert chat(**nothing, brand_new_field={"a": 1}, metadata={}, store=True) == chat()


@pytest.mark.parametrize("name", sorted(NOT_IN_COMPLETIONS))
def test_what_completions_cannot_do_is_refused_by_name(name: str) -> None:
    assert refused(completion, **{name: {"some": "thing"}}) == name
    for harmless in NOT_IN_COMPLETIONS[name]:
        assert completion(**{name: harmless}) == completion()


@pytest.mark.parametrize("name", sorted(NOT_IN_CHATS))
def test_what_chats_cannot_do_is_refused_by_name(name: str) -> None:
    assert refused(chat, **{name: {"some": "thing"}}) == name
    for harmless in NOT_IN_CHATS[name]:
        assert chat(**{name: harmless}) == chat()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("n", 0), ("n", 1.5), ("n", True), ("n", 500), ("stream", "yes"), ("stop", 5)],
        *[("stop", ""), ("stop", ["a", ""]), ("stop", ["x"] * 65), ("temperature", "hot")],
        *[("temperature", -1), ("top_p", 0), ("top_k", -2), ("top_k", "a"), ("min_p", 2)],
        *[("seed", -1), ("seed", 1.5), ("priority", "high"), ("model", 5), ("ignore_eos", 1)],
        *[("stop_token_ids", 5), ("stop_token_ids", [500]), ("logit_bias", [1])],
        *[("logit_bias", {"a": 1}), ("logit_bias", {"500": 1}), ("logit_bias", {"5": 101})],
        *[("min_tokens", -1), ("repetition_penalty", 0), ("presence_penalty", 3)],
        *[
            ("return_token_ids", 1),
            ("return_timings", "yes"),
            ("stream_options", {"include_usage": True}),
        ],
    ],
)
@pytest.mark.parametrize("work", [completion, chat])
def test_a_wrong_value_is_named(work: Any, name: str, value: Any) -> None:
    assert refused(work, **{name: value}) == name


@pytest.mark.parametrize(
    ("work", "body", "name"),
    [
        (completion, {"max_tokens": 0}, "max_tokens"),
        (completion, {"logprobs": 21}, "logprobs"),
        (completion, {"logprobs": True}, "logprobs"),
        (completion, {"logprobs": 1, "echo": True}, "echo"),
        (completion, {"n": 2, "best_of": 3}, "best_of"),
        (completion, {"prompt": ["x"] * 9, "n": 128}, "prompt"),
        (completion, {"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        (chat, {"max_completion_tokens": "a"}, "max_completion_tokens"),
        (chat, {"max_tokens": 0}, "max_tokens"),
        (chat, {"logprobs": 1}, "logprobs"),
        (chat, {"top_logprobs": 3}, "top_logprobs"),
        (chat, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (chat, {"messages": []}, "messages"),
        (chat, {"messages": "hello"}, "messages"),
        (chat, {"chat_template_kwargs": 5}, "chat_template_kwargs"),
        (chat, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        (chat, {"stream": True, "stream_options": 5}, "stream_options"),
        (
            chat,
            {"stream": True, "stream_options": {"include_usage": 5}},
            "stream_options.include_usage",
        ),
        (chat, {"headers": {"x-slo-ttft-ms": "soon"}}, "x-slo-ttft-ms"),
        (chat, {"headers": {"x-slo-tpot-ms": "0"}}, "x-slo-tpot-ms"),
        (chat, {"headers": {"x-slo-tpot-ms": "inf"}}, "x-slo-tpot-ms"),
        (chat, {"headers": {"x-slo-tpot-ms": "nan"}}, "x-slo-tpot-ms"),
    ],
)
def test_what_one_endpoint_refuses(work: Any, body: dict[str, Any], name: str) -> None:
    assert refused(work, **body) == name


@pytest.mark.parametrize("data", [b"", b"[]", b"5", b"{", b"\xff{}", b"[" * 100_000, b"null"])
def test_bodies_that_are_no_object(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="body"):
        json_object(data)


def test_a_field_is_named_once() -> None:
    assert str(BadField("n", "must be 1")) == "n must be 1"
