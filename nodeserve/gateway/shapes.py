"""The JSON of answers: whole ones, and the events of streams.

One of these is made for each HTTP request. Events are written by hand, since a busy gateway writes
tens of thousands of them a second and they differ in a few places only; tests read them with a
JSON parser.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from json.encoder import encode_basestring_ascii as quoted  # no line ends that a client splits at
from typing import Any

from nodeserve.client import Chunk, Completion, Usage
from nodeserve.client.aio import Call
from nodeserve.errors import NodeServeError
from nodeserve.gateway.asked import Asked
from nodeserve.gateway.engine import Prompt
from nodeserve.gateway.logprobs import TokenTexts, chat_logprobs, completion_logprobs
from nodeserve.gateway.meters import Reading
from nodeserve.gateway.problems import error_object
from nodeserve.text.tools import Style
from nodeserve.types import TokenLogprobs

DONE = b"data: [DONE]\n\n"


_encode = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would make one each time


def compact(value: Any) -> str:
    """JSON without spaces."""
    return _encode(value)


@dataclass(slots=True)
class Choice:
    """One answer on its way: the `index`-th of its request."""

    index: int
    prompt: Prompt
    call: Call
    reading: Reading
    begun: bool = False  # its first event was written
    num_tokens: int = 0
    num_chars: int = 0  # of its tokens' texts, where these have offsets


class Shape(ABC):
    """What one kind of endpoint answers."""

    prefix: str  # of ids

    def __init__(self, asked: Asked, request_id: str, model: str, created_s: int) -> None:
        self.asked = asked
        self.id = self.prefix + request_id
        self.model = model
        self.created_s = created_s
        self.texts: TokenTexts | None = None  # set where logprobs are asked for
        self.style: Style | None = None  # set where tools may be called

    @abstractmethod
    def whole(self, choices: Sequence[Choice], done: Sequence[Completion]) -> dict[str, Any]:
        """The body of a response."""

    @abstractmethod
    def events(self, choice: Choice, chunk: Chunk) -> bytes:
        """What is written for a part of an answer."""

    @abstractmethod
    def ended(self, choices: Sequence[Choice], num_tokens: int) -> bytes:
        """What is written behind a stream of so many tokens."""

    @abstractmethod
    def failed(self, error: NodeServeError) -> bytes:
        """What is written behind a stream that an error ends."""


class ChoiceShape(Shape):
    """An endpoint whose answers are `choices`."""

    whole_object: str
    event_object: str
    delta: tuple[str, str]  # around the text of an event

    def __init__(self, asked: Asked, request_id: str, model: str, created_s: int) -> None:
        super().__init__(asked, request_id, model, created_s)
        self._about = {"id": self.id, "created": created_s, "model": model}
        head = compact({**self._about, "object": self.event_object})[:-1]
        self._head = f'data: {head},"choices":['
        self._tail = '],"usage":null}\n\n' if asked.include_usage else "]}\n\n"
        self._plain = f'{self.delta[1]},"logprobs":null,"finish_reason":null}}'

    # ---- streams

    def events(self, choice: Choice, chunk: Chunk) -> bytes:
        first = "" if choice.begun else self.first(choice)
        choice.begun = True
        choice.num_tokens += len(chunk.token_ids)
        text = f'{self._head}{{"index":{choice.index},{self.delta[0]}{quoted(chunk.text)}'
        if chunk.logprobs is None and chunk.finish_reason is None and not self.asked.token_ids:
            return f"{first}{text}{self._plain}{self._end(choice)}".encode()  # as nearly all are
        return f"{first}{text}{self.delta[1]}{self._rest(choice, chunk)}".encode()

    def _rest(self, choice: Choice, chunk: Chunk) -> str:
        """From behind the text."""
        logprobs = None if chunk.logprobs is None else self._logprobs(choice, chunk)
        ends = "null" if chunk.finish_reason is None else quoted(chunk.finish_reason)
        ids = f',"token_ids":{compact(chunk.token_ids)}' if self.asked.token_ids else ""
        spent = ""
        if self.asked.timings and chunk.timings is not None:
            spent = f',"timings":{compact(asdict(chunk.timings))}'
        words = f',"logprobs":{compact(logprobs)},"finish_reason":{ends}{ids}{spent}}}'
        return words + self._end(choice)

    def _end(self, choice: Choice) -> str:
        """From behind the choice."""
        if not self.asked.continuous_usage:
            return self._tail
        return f'],"usage":{usage_json(len(choice.prompt.ids), choice.num_tokens)}}}\n\n'

    def ended(self, choices: Sequence[Choice], num_tokens: int) -> bytes:
        if not self.asked.include_usage:
            return DONE
        usage = usage_json(num_prompt_tokens(choices), num_tokens)
        return f'{self._head}],"usage":{usage}}}\n\n'.encode() + DONE

    def failed(self, error: NodeServeError) -> bytes:
        return f"data: {compact(error_object(error))}\n\n".encode() + DONE

    @abstractmethod
    def first(self, choice: Choice) -> str:
        """Events in front of an answer's first."""

    # ---- whole answers

    def whole(self, choices: Sequence[Choice], done: Sequence[Completion]) -> dict[str, Any]:
        num_tokens = sum(one.usage.completion_tokens for one in done)
        return {
            **self._about,
            "object": self.whole_object,
            "choices": [self._whole(c, one) for c, one in zip(choices, done, strict=True)],
            "usage": usage_object(Usage(num_prompt_tokens(choices), num_tokens)),
            **self.outside(choices),
        }

    def _whole(self, choice: Choice, done: Completion) -> dict[str, Any]:
        part = Chunk(logprobs=done.logprobs, token_ids=done.token_ids)
        shown = {
            "index": choice.index,
            **self.content(choice, done.text),
            "logprobs": None if done.logprobs is None else self._logprobs(choice, part),
            "finish_reason": done.finish_reason,
        }
        if self.asked.token_ids:
            shown["token_ids"] = done.token_ids
        if self.asked.timings:
            shown["timings"] = asdict(done.timings)
        return shown

    @abstractmethod
    def content(self, choice: Choice, text: str) -> dict[str, Any]:
        """An answer's text, as a choice has it."""

    def outside(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """More beside the choices."""
        return {}

    def _logprobs(self, choice: Choice, part: Chunk) -> dict[str, Any]:
        assert self.texts is not None and part.logprobs is not None
        return self.logprobs(self.texts, choice, part.token_ids, part.logprobs)

    @abstractmethod
    def logprobs(
        self, texts: TokenTexts, choice: Choice, ids: list[int], entries: list[TokenLogprobs]
    ) -> dict[str, Any]:
        """Of some tokens, in this endpoint's own form."""


class CompletionShape(ChoiceShape):
    """/v1/completions."""

    prefix = "cmpl-"
    whole_object = event_object = "text_completion"
    delta = ('"text":', "")

    def first(self, choice: Choice) -> str:
        prompt, more = choice.prompt, ""
        if not (self.asked.echo or self.asked.token_ids):
            return ""
        if self.asked.token_ids:
            more = f',"prompt_token_ids":{compact(prompt.ids)}'
        text = quoted(prompt.text or "") if self.asked.echo else '""'
        words = f'{{"index":{choice.index},"text":{text},"logprobs":null,"finish_reason":null'
        return f"{self._head}{words}{more}}}{self._tail}"

    def content(self, choice: Choice, text: str) -> dict[str, Any]:
        if self.asked.echo:
            text = (choice.prompt.text or "") + text
        ids = {"prompt_token_ids": choice.prompt.ids} if self.asked.token_ids else {}
        return {"text": text, **ids}

    def logprobs(
        self, texts: TokenTexts, choice: Choice, ids: list[int], entries: list[TokenLogprobs]
    ) -> dict[str, Any]:
        found, choice.num_chars = completion_logprobs(texts, ids, entries, choice.num_chars)
        return found


class ChatShape(ChoiceShape):
    """/v1/chat/completions."""

    prefix = "chatcmpl-"
    whole_object = "chat.completion"
    event_object = "chat.completion.chunk"
    delta = ('"delta":{"content":', "}")

    def first(self, choice: Choice) -> str:
        words = f'{{"index":{choice.index},"delta":{{"role":"assistant","content":""}}'
        words += ',"logprobs":null,"finish_reason":null}'
        if self.asked.token_ids:  # beside the choices, as in a whole answer
            tail = f',"prompt_token_ids":{compact(choice.prompt.ids)}'
            return f"{self._head}{words}]{tail}}}\n\n"
        return f"{self._head}{words}{self._tail}"

    def content(self, choice: Choice, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def outside(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return {"prompt_token_ids": choices[0].prompt.ids} if self.asked.token_ids else {}

    def logprobs(
        self, texts: TokenTexts, choice: Choice, ids: list[int], entries: list[TokenLogprobs]
    ) -> dict[str, Any]:
        return chat_logprobs(texts, ids, entries)


def usage_json(prompt: int, done: int) -> str:
    """As usage_object, for events: it may be in each."""
    sums = f'"completion_tokens":{done},"total_tokens":{prompt + done}'
    return f'{{"prompt_tokens":{prompt},{sums}}}'


def usage_object(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }


def num_prompt_tokens(choices: Sequence[Choice]) -> int:
    """Each prompt counts once, however many answers it has."""
    return sum({id(choice.prompt): len(choice.prompt.ids) for choice in choices}.values())
