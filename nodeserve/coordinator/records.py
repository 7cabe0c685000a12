"""From a worker's records to messages that add up.

Types are checked by the decoder. Here is what the coordinator relies on beyond them, checked
before any of a message is carried out: a worker that says nonsense is treated as failed, and by
then no request may be half changed, and none changed that another worker has.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from nodeserve.coordinator.link import WorkerLink
from nodeserve.coordinator.request import Request
from nodeserve.errors import ProtocolError
from nodeserve.policy.lifecycle import Phase
from nodeserve.types import Load
from nodeserve.wire.messages import (
    FINISH_REASONS,
    FROM_WORKER,
    Counted,
    FromWorker,
    KvPulled,
    KvReady,
    KvRefused,
    RequestFailed,
    StepDone,
    unpack_request_ids,
    unpack_times,
)

_PREFILLS, _PULLS = (Phase.PREFILL,), (Phase.MOVING,)
_COMPUTES = (Phase.PREFILL, Phase.DECODE)
MOST = 1e15  # of seconds, tokens or bytes: nothing real is near it, and its square is a number
_FINISHES = bytes(range(len(FINISH_REASONS)))
_NUM_LOAD = len(Load._fields)
_FREE = Load._fields.index("num_free_blocks")  # the one that may be negative
_RECEIVED = Load._fields.index("num_received")


def message_of(record: bytes) -> FromWorker:
    """The message in a worker's record; ProtocolError if it is none, or does not add up."""
    message = FROM_WORKER.decode(record)
    if isinstance(message, StepDone):
        _check_step(message)
    elif isinstance(message, Counted):
        _check_counted(message)
    elif isinstance(message, KvReady):
        _require(_are_ids(message.block_ids), "block ids")
    elif isinstance(message, KvPulled):
        _require(_are_amounts((message.num_bytes, message.seconds)), "a copy's figures")
    _require(_is_load(getattr(message, "load", None)), "load")
    return message


def check_holder(message: FromWorker, link: WorkerLink, requests: Mapping[int, Request]) -> None:
    """ProtocolError if this worker counts more prompts and pulls than it was sent, or speaks of
    what it does with an open request that it does not have, or not so; or if it only follows."""
    index, num_sent = link.index, link.account.num_sent
    _require(link.leads, "a follower's word about requests")
    load = getattr(message, "load", None)
    _require(load is None or load[_RECEIVED] <= num_sent, "requests received")
    match message:
        case StepDone():
            offered = [request_id for request_id, _ in message.kv_ready]
            _check_held(offered, index, _PREFILLS, requests)
            _check_held(unpack_request_ids(message.request_ids), index, _COMPUTES, requests)
            _check_held(unpack_request_ids(message.preempted), index, _COMPUTES, requests)
        case KvReady():
            _check_held([message.request_id], index, _PREFILLS, requests)
        case KvPulled() | KvRefused():
            _check_held([message.request_id], index, _PULLS, requests)
        case RequestFailed():
            _check_held([message.request_id], index, (*_COMPUTES, *_PULLS), requests)


def _check_held(
    ids: Iterable[int], index: int, phases: tuple[Phase, ...], requests: Mapping[int, Request]
) -> None:
    """What ended meanwhile may be spoken of by anybody: that crossed on the way."""
    for request_id in ids:
        request = requests.get(request_id)
        if request is None or (request.holder == index and request.phase in phases):
            continue
        _require(request.phase is Phase.DRAINING, "a request that is elsewhere")


def _check_step(step: StepDone) -> None:
    num_tokens = len(step.finish)
    _require(len(step.request_ids) == 8 * num_tokens, "request ids")
    _require(len(step.token_ids) == 4 * num_tokens, "token ids")
    _require(not step.finish.translate(None, _FINISHES), "finish")
    _require(len(step.started) == len(step.received) and not len(step.started) % 8, "started")
    _require(not len(step.preempted) % 8, "preempted")
    _require(all(map(_is_offer, step.kv_ready)), "pages")
    work = (step.num_prefill_tokens, step.attention, step.num_decodes, step.kv_tokens)
    _require(_are_amounts((step.step, step.step_s, *work)), "a step's figures")
    _require(_are_times((step.began_s, *unpack_times(step.received))), "times")
    for entry in step.logprobs or ():
        _require(_is_logprobs(entry, num_tokens), "logprobs")


def _check_counted(told: Counted) -> None:
    lists = (told.waiting, told.running, told.pulling, told.pinned, told.preempted)
    _require(not any(len(ids) % 8 for ids in lists), "counted requests")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ProtocolError(f"a worker's record does not add up: {what}")


def _is_load(load: Any) -> bool:
    return load is None or (
        len(load) == _NUM_LOAD
        and set(map(type, load)) == {int}
        and abs(load[_FREE]) <= MOST
        and _are_amounts(load[:_FREE] + load[_FREE + 1 :])
    )


def _are_amounts(values: Iterable[float]) -> bool:
    """What is counted or measured: policies divide, square and add it up."""
    for one in values:  # noqa: SIM110  # of every record: a generator takes twice as long
        if not 0 <= one <= MOST:  # NaN is in no range
            return False
    return True


def _are_times(values: Iterable[float]) -> bool:
    for one in values:  # noqa: SIM110  # likewise
        if not -MOST <= one <= MOST:
            return False
    return True


def _is_offer(entry: Any) -> bool:
    return (
        type(entry) is list
        and len(entry) == 2
        and type(entry[0]) is int
        and type(entry[1]) is bytes
        and _are_ids(entry[1])
    )


def _is_logprobs(entry: Any, num_tokens: int) -> bool:
    if type(entry) is not list or [type(one) for one in entry] != [int, float, bytes, bytes]:
        return False
    place, _, top_ids, top_logprobs = entry
    return 0 <= place < num_tokens and len(top_ids) == len(top_logprobs) and _are_ids(top_ids)


def _are_ids(data: bytes) -> bool:
    return not len(data) % 4
