"""What a worker may say: anything that does not add up is an error before it is carried out."""

import math
from typing import Any

import pytest

from nodeserve.coordinator.records import message_of
from nodeserve.errors import ProtocolError
from nodeserve.wire.messages import (
    FROM_WORKER,
    Alive,
    Dropped,
    KvPulled,
    KvReady,
    StepDone,
    pack_ids,
    pack_request_ids,
    pack_times,
)

LOAD = [1, 2, 3, 4, 5, 6]
STEP = StepDone(
    request_ids=pack_request_ids([7, 8]),
    token_ids=pack_ids([1, 2]),
    finish=bytes([0, 2]),
    logprobs=[[1, -0.5, pack_ids([2]), pack_ids([0])]],
    kv_ready=[[7, pack_ids([3, 4])]],
    started=pack_request_ids([8]),
    preempted=b"",
    load=LOAD,
    step=1,
    began_s=1.0,
    step_s=0.1,
    num_prefill_tokens=4,
    attention=1.0,
    num_decodes=1,
    kv_tokens=9,
    received=pack_times([0.5]),
)
WRONG: dict[str, dict[str, Any]] = {
    "a request too many": {"request_ids": pack_request_ids([7, 8, 9])},
    "half a token": {"token_ids": b"abcdefg"},
    "unknown finish": {"finish": bytes([0, 3])},
    "no time for a start": {"received": b""},
    "half an id": {"preempted": b"abc"},
    "pages without a request": {"kv_ready": [pack_ids([3, 4])]},
    "pages of half ids": {"kv_ready": [[7, b"abc"]]},
    "logprobs of nobody": {"logprobs": [[2, -0.5, b"", b""]]},
    "logprobs without one": {"logprobs": [[1, pack_ids([2]), pack_ids([0])]]},
    "logprobs that do not pair up": {"logprobs": [[1, -0.5, pack_ids([2]), b""]]},
    "a short load": {"load": LOAD[:5]},
    "a load of words": {"load": [*LOAD[:5], "x"]},
    "fewer than no requests": {"load": [-1, *LOAD[1:]]},
    "a step without end": {"step_s": math.inf},
    "a step that ended before it began": {"step_s": -0.1},
    "a step begun at no time": {"began_s": math.nan},
    "a request received at no time": {"received": pack_times([math.nan])},
    "attention that is no number": {"attention": math.nan},
    "attention whose square is no number": {"attention": 1e200},
    "negative work": {"kv_tokens": -1},
}
ODD = [
    Alive([1]),
    Dropped(1, LOAD[1:]),
    KvReady(1, b"x"),
    KvPulled(1, -1, 0.1),
    KvPulled(1, 1, math.inf),
]


def test_what_adds_up_passes() -> None:
    for message in (
        STEP,
        Dropped(1, LOAD),
        KvReady(1, pack_ids([1])),
        KvPulled(1, 100, 0.1),
        Alive([1, 2, 3, -4, 5, 6]),  # more was promised than is free
        STEP._replace(logprobs=None),
    ):
        assert message_of(FROM_WORKER.encode(message)) == message


@pytest.mark.parametrize("name", WRONG)
def test_a_step_that_does_not_add_up_is_refused(name: str) -> None:
    with pytest.raises(ProtocolError, match="does not add up"):
        message_of(FROM_WORKER.encode(STEP._replace(**WRONG[name])))


@pytest.mark.parametrize("message", ODD)
def test_so_are_the_others(message: Any) -> None:
    with pytest.raises(ProtocolError, match="does not add up"):
        message_of(FROM_WORKER.encode(message))
