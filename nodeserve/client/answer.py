"""One request's answer, from arrivals to chunks. No connection, no loop, no clock of its own."""

from dataclasses import fields
from typing import Any

from nodeserve.client.connection import Arrival
from nodeserve.client.results import Chunk, Latency, Usage
from nodeserve.errors import ProtocolError, from_code
from nodeserve.text import Detokenizer, StopStrings
from nodeserve.types import Timings, TokenLogprobs
from nodeserve.wire.messages import End, unpack_floats, unpack_ids

_TIMING_FIELDS = frozenset(field.name for field in fields(Timings))


class Answer:
    """Grows with `add`, is complete with `finish`."""

    def __init__(
        self,
        num_prompt_tokens: int,
        sent_s: float,
        detokenizer: Detokenizer | None,
        stops: StopStrings | None,
        wants_logprobs: bool,
    ) -> None:
        self.stopped = False  # a stop string came: the request is to be aborted
        self._num_prompt_tokens = num_prompt_tokens
        self._sent_s = sent_s
        self._detokenizer = detokenizer
        self._stops = stops
        self._wants_logprobs = wants_logprobs
        self._num_tokens = 0
        self._first_s: float | None = None
        self._last_s: float | None = None

    @property
    def may_stop(self) -> bool:
        """There are stop strings, which end it before its end comes."""
        return self._stops is not None

    def add(self, arrivals: list[Arrival]) -> Chunk:
        """The part that these arrivals make; what follows a stop string is left out."""
        if len(arrivals) == 1 and not self._wants_logprobs:  # as nearly all are
            (arrival,) = arrivals
            ids = unpack_ids(arrival.token_ids).tolist()
            self._count(len(ids), arrival.at_s)
            return Chunk(self._text(ids), ids)
        text: list[str] = []
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        for arrival in arrivals:
            if self.stopped:
                break
            ids = list(unpack_ids(arrival.token_ids))
            if self._wants_logprobs:
                logprobs += read_logprobs(arrival.logprobs, len(ids))
            token_ids += ids
            self._count(len(ids), arrival.at_s)
            text.append(self._text(ids))
        return Chunk("".join(text), token_ids, logprobs if self._wants_logprobs else None)

    def finish(self, end: End) -> Chunk:
        """The last part. Raises what `end` says when the request failed and no stop string came."""
        if self.stopped:
            return self._last("", "stop", self._received(), read_timings(end.timings))
        if end.code is not None:
            error = from_code(end.code, end.message)
            error.retry_after_s = end.retry_after_s
            raise error
        usage = Usage(
            end.usage.get("prompt_tokens", self._num_prompt_tokens),
            end.usage.get("completion_tokens", self._num_tokens),
        )
        return self._last(self._rest(), end.reason, usage, read_timings(end.timings))

    def finish_without_end(self) -> Chunk:
        """The last part when the connection ended after a stop string: nothing is missing."""
        assert self.stopped
        return self._last("", "stop", self._received(), Timings())

    def _text(self, token_ids: list[int]) -> str:
        if self._detokenizer is None:
            return ""
        return self._through_stops(self._detokenizer.push(token_ids))

    def _through_stops(self, text: str) -> str:
        if self._stops is None:
            return text
        text, self.stopped = self._stops.push(text)
        return text

    def _rest(self) -> str:
        if self._detokenizer is None:
            return ""
        text = self._through_stops(self._detokenizer.finish())
        if self._stops is not None and not self.stopped:
            text += self._stops.finish()
        return text

    def _count(self, num_tokens: int, at_s: float) -> None:
        if num_tokens:
            self._num_tokens += num_tokens
            self._first_s = at_s if self._first_s is None else self._first_s
            self._last_s = at_s

    def _received(self) -> Usage:
        return Usage(self._num_prompt_tokens, self._num_tokens)

    def _last(self, text: str, reason: str, usage: Usage, timings: Timings) -> Chunk:
        return Chunk(
            text=text,
            logprobs=[] if self._wants_logprobs else None,
            finish_reason="stop" if self.stopped else reason,
            usage=usage,
            timings=timings,
            latency=self._latency(),
        )

    def _latency(self) -> Latency:
        if self._first_s is None or self._last_s is None:
            return Latency()
        gaps = self._num_tokens - 1
        return Latency(
            ttft_s=self._first_s - self._sent_s,
            tpot_s=(self._last_s - self._first_s) / gaps if gaps else None,
            e2e_s=self._last_s - self._sent_s,
        )


def merge(first: Chunk, last: Chunk) -> Chunk:
    """Two neighbouring parts as one; `last` may be the end."""
    return Chunk(
        text=first.text + last.text,
        token_ids=first.token_ids + last.token_ids,
        logprobs=None if first.logprobs is None else first.logprobs + (last.logprobs or []),
        finish_reason=last.finish_reason,
        usage=last.usage,
        timings=last.timings,
        latency=last.latency,
    )


def read_timings(values: dict[str, Any]) -> Timings:
    """What a server says; names that this client does not know are a newer server's."""
    return Timings(**{name: value for name, value in values.items() if name in _TIMING_FIELDS})


def read_logprobs(entries: list[Any] | None, num_tokens: int) -> list[TokenLogprobs]:
    """One entry per token, as they travel: [logprob, top ids, top logprobs]."""
    if entries is None or len(entries) != num_tokens:
        raise ProtocolError("log probabilities were asked for and did not come with every token")
    return [_entry(entry) for entry in entries]


def _entry(entry: Any) -> TokenLogprobs:
    match entry:
        case [float(logprob), bytes(ids), bytes(values)] if (
            len(ids) == len(values) and len(ids) % 4 == 0
        ):
            top = dict(zip(unpack_ids(ids), unpack_floats(values), strict=True))
            return TokenLogprobs(logprob, top)
    raise ProtocolError("an entry of logprobs is not [logprob, ids, logprobs]")
