"""From a client's Submit to a Request, or the typed error that says what is wrong with it."""

import os
from array import array
from dataclasses import dataclass

from nodeserve.coordinator.request import Request, Stamps
from nodeserve.coordinator.streams import Stream
from nodeserve.errors import InvalidRequest, PromptTooLong
from nodeserve.policy.blocks import blocks_for
from nodeserve.policy.units import Waiting
from nodeserve.types import check_priority, check_sampling, sampling_from, shown
from nodeserve.wire.messages import Submit, unpack_ids


@dataclass(frozen=True, slots=True)
class Limits:
    """What the coordinator holds a request to; resolved at start."""

    vocab_size: int
    max_model_len: int  # tokens
    block_size: int  # tokens


def admit(
    message: Submit, request_id: int, stream: Stream, limits: Limits, now_s: float
) -> Request:
    """A request that every worker can take if its tokens exist (`check_vocabulary`); InvalidRequest
    names the field that prevents it."""
    tokens = read_tokens(message.token_ids, limits)
    sampling = sampling_from(message.sampling)
    check_sampling(sampling, limits.vocab_size)
    check_slo(message.slo)
    check_priority(message.priority)
    values = dict(message.sampling)
    if not sampling.greedy and sampling.seed is None:
        # Drawn here, once, so that a request that is put back goes on as it began.
        values["seed"] = int.from_bytes(os.urandom(7), "little")
    num_blocks = blocks_for(len(tokens) + 1, limits.block_size)
    return Request(
        request_id=request_id,
        client_id=message.request_id,
        stream=stream,
        tokens=tokens,
        num_prompt_tokens=len(tokens),
        sampling=values,
        slo=message.slo,
        max_tokens=sampling.max_tokens,
        waiting=Waiting(request_id, len(tokens), num_blocks, now_s, message.priority),
        stamps=Stamps(now_s),
        num_sent=len(tokens),
        wants_logprobs=sampling.logprobs is not None,
    )


def read_tokens(data: bytes, limits: Limits) -> "array[int]":
    """The prompt's ids, or the error that says what is wrong with their number."""
    if len(data) % 4:
        raise InvalidRequest(f"token_ids must be int32s: {len(data)} bytes is no multiple of 4")
    tokens = unpack_ids(data)
    if not tokens:
        raise InvalidRequest("the prompt is empty: give at least one token")
    if len(tokens) >= limits.max_model_len:
        raise PromptTooLong(
            f"the prompt has {len(tokens)} tokens; at most {limits.max_model_len - 1} fit the"
            f" context of {limits.max_model_len} with one new token"
        )
    return tokens


def check_vocabulary(tokens: "array[int]", vocab_size: int) -> None:
    """Every id has a token. This is the one look at all of a prompt, so it comes last."""
    highest = max(memoryview(tokens).cast("B").cast("I"))  # unsigned: below 0 is very high
    if highest >= vocab_size:
        wrong = next(token for token in tokens if not 0 <= token < vocab_size)
        raise InvalidRequest(f"token id {wrong} is outside the vocabulary of {vocab_size}")


def check_slo(slo: dict[str, object] | None) -> None:
    """An slo has positive numbers under the two known names."""
    for name, value in (slo or {}).items():
        if name not in ("ttft_ms", "tpot_ms"):
            raise InvalidRequest(f"unknown slo field {shown(name)}; known fields: ttft_ms, tpot_ms")
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise InvalidRequest(f"slo {name} must be a positive number, got {shown(value)}")
