"""What a caller gets: a whole answer, or its parts as they come."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nodeserve.types import Timings, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Latency:
    """What the client's clock saw, from handing the request to the socket to a token's arrival.

    `tpot_s` is (e2e_s - ttft_s) / (tokens - 1), None with fewer than two tokens; `ttft_s` and
    `e2e_s` are None when no token came.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of an answer. Only the last one has what is not None from `finish_reason` on.

    `text` may be empty while `token_ids` are not (an incomplete character, or what may become a
    stop string), and the last chunk may have text and no tokens.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None  # one per token, when they were asked for
    finish_reason: str | None = None  # "stop" or "length"
    usage: Usage | None = None
    timings: Timings | None = None  # the server's account
    latency: Latency | None = None  # the client's measurement


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. With a stop string `token_ids` has all tokens received, `text` ends before.

    Without detokenising `text` is empty.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[TokenLogprobs] | None
    usage: Usage
    timings: Timings
    latency: Latency


@dataclass(frozen=True, slots=True)
class Health:
    """How a server is. One that does not answer has none: that is ConnectionLost."""

    state: str  # ready, degraded, not ready, stopping
    ready: bool  # it serves: it is ready, or degraded
    reasons: tuple[str, ...]  # why it is not simply ready, for people
    loop_lag_s: float  # by which its loop was late within the last seconds, at worst


@dataclass(frozen=True, slots=True)
class Audit:
    """Whether a server's books balance, as docs/protocol.md says."""

    problems: tuple[str, ...]  # what differs, in words
    requests: dict[str, int]  # how many in which phase
    workers: list[dict[str, Any]]

    @property
    def adds_up(self) -> bool:
        return not self.problems


def join(chunks: Iterable[Chunk]) -> Completion:
    """The answer that all chunks of one request make."""
    parts = list(chunks)
    last = parts[-1]
    assert last.finish_reason and last.usage and last.timings and last.latency
    logprobs = [entry for part in parts for entry in part.logprobs or ()]
    return Completion(
        text="".join(part.text for part in parts),
        token_ids=[token_id for part in parts for token_id in part.token_ids],
        finish_reason=last.finish_reason,
        logprobs=None if last.logprobs is None else logprobs,
        usage=last.usage,
        timings=last.timings,
        latency=last.latency,
    )
