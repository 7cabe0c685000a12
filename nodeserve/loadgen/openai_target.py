"""Requests to any server that speaks OpenAI's completions or chat completions, streamed.

A token event is a choice with text, or one without text and without an end (half a character). A
first delta that only names the role is none. How many tokens an event brings nobody says: the
server's usage has the sum, and times between tokens are times between events.
"""

import json
import time
from collections.abc import Mapping
from typing import Any

from nodeserve.client.answer import read_timings
from nodeserve.errors import (
    ConfigError,
    InvalidRequest,
    ModelError,
    NodeServeError,
    Overloaded,
    ProtocolError,
)
from nodeserve.loadgen.events import EventReader
from nodeserve.loadgen.http_client import HttpClient, parse_url
from nodeserve.loadgen.prompts import (
    VOCAB_SIZE,
    chat_counter,
    rough_text,
    text_counter,
    text_prompt,
    token_ids,
)
from nodeserve.loadgen.records import Job, Sample
from nodeserve.loadgen.targets import About, TargetOptions
from nodeserve.text import Tokenizer

ROUTES = {"completions": "v1/completions", "chat": "v1/chat/completions"}
HEADERS = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
TEXTS = ("content", "reasoning_content", "reasoning")  # of a delta
MAX_ERROR_CHARS = 300
OUR_GATEWAY = "nodeserve"  # who owns its model, in /v1/models: others may refuse our own fields


def slo_headers(slo_ms: Mapping[str, float]) -> dict[str, str]:
    """`ttft_ms` as x-slo-ttft-ms, and so on."""
    return {f"x-slo-{name.replace('_', '-')}": f"{value:g}" for name, value in slo_ms.items()}


class OpenAITarget:
    """Output lengths are forced by max_tokens and ignore_eos, which most servers know."""

    def __init__(self, options: TargetOptions) -> None:
        assert options.url is not None
        self._options = options
        self._model = options.model
        self._is_ours = False
        self._tokenizer = Tokenizer.load(options.tokenizer) if options.tokenizer else None
        self._client = HttpClient(
            parse_url(options.url),
            {**HEADERS, **slo_headers(options.slo_ms), **options.headers},
            options.connect_timeout_s,
        )

    async def open(self) -> About:
        listed = await self._models()
        if self._model is None:
            if not listed:
                raise ConfigError("the server lists no model on /v1/models: name it with --model")
            self._model = str(listed[0]["id"])
        card = next((one for one in listed if one["id"] == self._model), {})
        self._is_ours = card.get("owned_by") == OUR_GATEWAY
        text = self._options.api == "chat" or self._options.prompts_as_text
        return About(
            model=self._model,
            kind="openai",
            num_workers=await self._num_workers() if self._is_ours else None,
            max_model_len=card.get("max_model_len"),
            exact_prompts=not text or self._tokenizer is not None,
        )

    async def close(self) -> None:
        await self._client.close()

    def payload(self, job: Job, run: int) -> bytes:
        body: dict[str, Any] = {
            "model": self._model,
            **self._prompt(job, run),
            "max_tokens": job.arrival.num_output_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._options.ignore_eos:
            body["ignore_eos"] = True
        if self._is_ours:
            body["return_timings"] = True
        body.update(self._options.extra_body)
        return json.dumps(body, separators=(",", ":")).encode()

    async def ask(self, job: Job, payload: bytes, sample: Sample, began_s: float) -> None:
        answer = _Answer(sample, began_s)
        sample.sent_s = time.perf_counter() - began_s
        route = ROUTES[self._options.api]
        status = await self._client.exchange("POST", route, answer.on_body, payload)
        if status != 200:
            raise refusal(status, answer.error_text)
        answer.finish()

    def _prompt(self, job: Job, run: int) -> dict[str, Any]:
        options, tokenizer = self._options, self._tokenizer
        if options.api == "chat":
            count = chat_counter(tokenizer) if tokenizer else None
            text = text_prompt(job, run, count) if count else rough_text(job, run)
            return {"messages": [{"role": "user", "content": text}]}
        if options.prompts_as_text:
            if tokenizer is None:
                return {"prompt": rough_text(job, run)}
            return {"prompt": text_prompt(job, run, text_counter(tokenizer))}
        vocab_size = options.vocab_size or (tokenizer.vocab_size if tokenizer else VOCAB_SIZE)
        return {"prompt": token_ids(job, run, vocab_size, options.block_tokens).tolist()}

    async def _models(self) -> list[dict[str, Any]]:
        """What /v1/models lists; nothing where there is no such route."""
        listed = (await self._got("v1/models")).get("data")
        if not isinstance(listed, list):
            return []
        return [one for one in listed if isinstance(one, dict) and "id" in one]

    async def _num_workers(self) -> int | None:
        """As our gateway shows them on its page."""
        workers = (await self._got("nodeserve/view")).get("workers")
        return len(workers) or None if isinstance(workers, list) else None

    async def _got(self, route: str) -> dict[str, Any]:
        """A JSON object; an empty one where nothing like that is answered."""
        parts: list[bytes] = []
        status = await self._client.exchange("GET", route, lambda data, _: parts.append(data))
        if status in (401, 403):
            raise refusal(status, b"".join(parts).decode("utf-8", "replace"))
        try:
            found = json.loads(b"".join(parts))
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


class _Answer:
    """Turns the events of one response into a sample's times."""

    def __init__(self, sample: Sample, began_s: float) -> None:
        self._sample = sample
        self._began_s = began_s
        self._events = EventReader()
        self._raw = bytearray()  # the beginning, for what an error says
        self._done = False

    @property
    def error_text(self) -> str:
        return self._raw.decode("utf-8", "replace")

    def on_body(self, data: bytes, at_s: float) -> None:
        if len(self._raw) < 4 * MAX_ERROR_CHARS:
            self._raw += data
        for event in self._events.feed(data):
            if event == "[DONE]":
                self._done = True
            else:
                self._on_event(event, at_s)

    def finish(self) -> None:
        """After the response; NodeServeError if it was no whole answer."""
        sample = self._sample
        if not sample.times:
            raise ProtocolError(f"the answer has no token: {self.error_text[:MAX_ERROR_CHARS]!r}")
        told = sample.told_output_tokens
        if not self._done and told is None:
            raise ProtocolError("the stream ended without [DONE]")

    def _on_event(self, event: str, at_s: float) -> None:
        try:
            message = json.loads(event)
        except ValueError:
            raise ProtocolError(f"an event of the stream is no JSON: {event[:80]!r}") from None
        if not isinstance(message, dict):
            raise ProtocolError(f"an event of the stream is no object: {event[:80]!r}")
        if message.get("error"):
            raise ProtocolError(f"the server ended the stream: {str(message['error'])[:200]}")
        usage, choices = message.get("usage"), message.get("choices")
        if isinstance(usage, dict):
            self._sample.told_prompt_tokens = usage.get("prompt_tokens")
            self._sample.told_output_tokens = usage.get("completion_tokens")
        choices = choices if isinstance(choices, list) else []
        choices = [one for one in choices if isinstance(one, dict)]
        if any(has_token(one) for one in choices):
            self._sample.times.append(at_s - self._began_s)
            self._sample.counts.append(1)
        for choice in choices:
            if isinstance(timings := choice.get("timings"), dict):
                self._sample.timings = read_timings(timings)


def has_token(choice: dict[str, Any]) -> bool:
    """Whether a choice of a stream brings a token."""
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        texts = [choice.get("text")]
    else:
        texts = [delta[name] for name in TEXTS if delta.get(name) is not None]
        if not any(texts) and "role" in delta:
            return False
    if any(texts):
        return True
    return "" in texts and choice.get("finish_reason") is None


def refusal(status: int, text: str) -> NodeServeError:
    """The error that a status other than 200 stands for."""
    words = f"HTTP {status}: {' '.join(text.split())[:MAX_ERROR_CHARS]}"
    if status in (429, 503):
        return Overloaded(words)
    if status == 404:
        return ModelError(words)
    if 400 <= status < 500:
        return InvalidRequest(words)
    return NodeServeError(words)
