"""Which sampling settings are taken, and how the others are refused."""

import math
from dataclasses import replace
from typing import Any

import pytest

from nodeserve.errors import InvalidRequest
from nodeserve.types import (
    CONSTRAINT_KINDS,
    MAX_CONSTRAINT_BYTES,
    MAX_LOGPROBS,
    MAX_SEED,
    SAMPLING_FIELDS,
    Constraint,
    Sampling,
    check_sampling,
    sampling_from,
    sampling_to,
)

VOCAB = 100
GOOD: list[dict[str, Any]] = [
    {},
    {"max_tokens": 1},
    {"max_tokens": 5, "min_tokens": 5},
    {"temperature": 0},
    {"temperature": 100.0},
    {"top_k": 10**6},
    {"top_p": 1e-9},
    {"min_p": 1.0},
    {"seed": 0},
    {"seed": MAX_SEED},
    {"repetition_penalty": 0.01},
    {"presence_penalty": -2, "frequency_penalty": 2},
    {"logit_bias": {0: -100, VOCAB - 1: 100.0}},
    {"stop_token_ids": [0, VOCAB - 1]},
    {"ignore_eos": True},
    {"logprobs": 0},
    {"logprobs": MAX_LOGPROBS},
    {"constraint": None},
    {"constraint": {"regex": "é" * (MAX_CONSTRAINT_BYTES // 2)}, "ignore_eos": False},
    *({"constraint": {kind: "{}"}} for kind in CONSTRAINT_KINDS),
]
BAD: list[tuple[str, Any]] = [
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 2**31),
    ("max_tokens", 1.5),
    ("max_tokens", True),
    ("max_tokens", "5"),
    ("max_tokens", None),
    ("min_tokens", -1),
    ("min_tokens", 257),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", -0.1),
    ("temperature", "hot"),
    ("temperature", None),
    ("temperature", True),
    ("temperature", 10**400),
    ("top_k", -1),
    ("top_k", 0.5),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_p", math.nan),
    ("min_p", -0.1),
    ("min_p", 2),
    ("seed", -1),
    ("seed", MAX_SEED + 1),
    ("seed", 0.5),
    ("repetition_penalty", 1e-300),  # its inverse is infinite
    ("repetition_penalty", 0),
    ("repetition_penalty", math.inf),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("logit_bias", [1]),
    ("logit_bias", {VOCAB: 1.0}),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {"1": 1.0}),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", {1: 101}),
    ("stop_token_ids", 5),
    ("stop_token_ids", "ab"),
    ("stop_token_ids", [VOCAB]),
    ("stop_token_ids", [None]),
    ("ignore_eos", 1),
    ("logprobs", -1),
    ("logprobs", MAX_LOGPROBS + 1),
    ("logprobs", True),
    ("constraint", "{}"),
    ("constraint", {}),
    ("constraint", {"xml": "<a/>"}),
    ("constraint", {"regex": 5}),
    ("constraint", {"regex": ""}),
    ("constraint", {"regex": "a", "grammar": "b"}),
    ("constraint", {"regex": "\ud800"}),
    ("constraint", {"regex": "é" * (MAX_CONSTRAINT_BYTES // 2) + "a"}),
    ("constraint", Constraint("xml", "<a/>")),
]


@pytest.mark.parametrize("values", GOOD, ids=str)
def test_good_values_are_taken_and_travel(values: dict[str, Any]) -> None:
    sampling = sampling_from(values)
    check_sampling(sampling, VOCAB)
    assert sampling_from(sampling_to(sampling)) == sampling


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: repr(value)[:20])
def test_bad_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name):
        check_sampling(sampling_from({name: value}), VOCAB)


def test_a_constraint_says_itself_where_an_answer_may_end() -> None:
    constraint = Constraint("regex", "a")
    for other in ({"ignore_eos": True}, {"min_tokens": 1}):
        with pytest.raises(InvalidRequest, match=next(iter(other))):
            check_sampling(Sampling(constraint=constraint, **other), VOCAB)
    assert Sampling(constraint=constraint).needs_tokens, "no choice without those before it"


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="'temprature'.*temperature"):
        sampling_from({"temprature": 1.0})
    with pytest.raises(InvalidRequest, match="unknown sampling field '7'"):
        sampling_from({7: 1.0})  # type: ignore[dict-item]


def test_only_what_differs_from_the_defaults_travels() -> None:
    assert sampling_to(Sampling()) == {}
    assert sampling_to(Sampling(seed=1, top_p=0.5)) == {"seed": 1, "top_p": 0.5}


def test_every_field_is_checked() -> None:
    """A field that nobody checks would go unchecked into a worker."""
    assert {name for name, _ in BAD} == SAMPLING_FIELDS


@pytest.mark.parametrize(
    "change",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"logit_bias": {1: 1.0}},
        {"min_tokens": 1},
    ],
    ids=str,
)
def test_what_shapes_logits(change: dict[str, Any]) -> None:
    assert not Sampling().shapes_logits
    assert replace(Sampling(), **change).shapes_logits


@pytest.mark.parametrize(
    ("change", "needs"),
    [
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": -0.5}, True),
        ({"frequency_penalty": 0.5}, True),
        ({"logit_bias": {1: 1.0}}, False),
        ({"min_tokens": 1, "top_k": 3, "seed": 1, "logprobs": 2}, False),
    ],
)
def test_only_penalties_need_the_tokens_before(change: dict[str, Any], needs: bool) -> None:
    assert replace(Sampling(), **change).needs_tokens is needs


def test_greedy() -> None:
    assert Sampling(temperature=0).greedy
    assert not Sampling().greedy


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    assert Sampling(temperature=1e-50).greedy and not Sampling(temperature=0.01).greedy
