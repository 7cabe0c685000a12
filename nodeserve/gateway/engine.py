"""The server behind the gateway: its model, its tokenizer, and requests to it."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from nodeserve.client import AsyncClient, Health
from nodeserve.client.aio import Call
from nodeserve.errors import InvalidRequest, NodeServeError
from nodeserve.gateway.asked import Asked
from nodeserve.gateway.problems import BadField, HttpProblem
from nodeserve.gateway.tables import MAX_TOKENS
from nodeserve.gateway.tool_answers import constrained
from nodeserve.text import Detokenizer, StopStrings, Tokenizer
from nodeserve.text.constraints import check
from nodeserve.text.tools import Style, style_of, with_tools
from nodeserve.types import MAX_SEED, Sampling, check_priority, check_sampling, sampling_from
from nodeserve.wire.messages import pack_ids

LONG_CHARS = 1 << 14  # text of which the tokenizer would hold up other streams for milliseconds
CHECK_TIMEOUT_S = 5.0  # for the server's loop to answer
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an answer continues; `text` is None for one given in token ids."""

    ids: list[int]
    text: str | None


class Engine:
    """One connection to the server, made again when it is lost."""

    def __init__(self, client: AsyncClient, tool_call_parser: str | None = None) -> None:
        self.client = client
        self._tool_call_parser = tool_call_parser
        self.created_s = int(time.time())  # of the model's entry in /v1/models

    async def about(self) -> dict[str, Any]:
        """What the server says about itself: docs/protocol.md, Hello."""
        return (await self.client.connection()).server

    async def health(self) -> Health:
        """What the server says of itself now; ConnectionLost when it does not answer."""
        return await self.client.health(CHECK_TIMEOUT_S)

    async def check_model(self, name: str | None) -> str:
        """The served model's name, which `name` must be if it is given."""
        served: str = (await self.about())["model"]
        if name is not None and name != served:
            words = f"the model {name!r} does not exist here; this server has {served!r}"
            raise HttpProblem(404, "model_not_found", words, "model")
        return served

    async def tokenizer(self) -> Tokenizer:
        return await self.client.tokenizer()

    async def stats(self) -> dict[str, Any] | None:
        """The node's state (docs/protocol.md, Stats); None when the server does not answer."""
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                return await self.client.stats()
        except (NodeServeError, TimeoutError):
            return None

    async def prompts(self, asked: Asked) -> list[Prompt]:
        """Token ids of what is asked, by the tokenizer and the chat template if there is text."""
        if asked.messages is not None:
            return [Prompt(await self.chat_ids(asked), None)]
        return [await self._prompt(one, asked.add_special) for one in asked.prompts]

    async def _prompt(self, given: str | list[int], add_special: bool) -> Prompt:
        if not isinstance(given, str):
            return Prompt(given, None)
        tokenizer = await self.tokenizer()
        ids = await beside(len(given), lambda: tokenizer.encode(given, add_special=add_special))
        return Prompt(ids, given)

    async def chat_ids(self, asked: Asked, add_special: bool = False) -> list[int]:
        tokenizer, messages = await self.tokenizer(), asked.messages
        assert messages is not None
        tools = () if asked.tooling is None else asked.tooling.tools
        variables = asked.variables
        if tools or any(map(calls_or_result, messages)):
            messages, told = with_tools(await self.style(), messages, tools)
            variables = variables | told

        def render() -> list[int]:
            text = tokenizer.chat_prompt(messages, asked.add_generation_prompt, **variables)
            return tokenizer.encode(text, add_special=add_special)

        return await beside(sum(map(size_of, messages)), render)

    async def settled(self, asked: Asked) -> Asked:
        """With the constraint that its tools give. BadField names the field whose schema,
        expression or grammar cannot be compiled."""
        if asked.tooling is not None:
            asked = constrained(asked, await self.style(), await self.tokenizer())
        constraint = asked.sampling.get("constraint")
        if constraint is not None:
            try:
                await asyncio.to_thread(check, constraint)
            except InvalidRequest as problem:
                words = str(problem).removeprefix("constraint ")
                raise BadField(asked.constraint_field, words) from None
        return asked

    async def style(self) -> Style:
        """How the model writes calls."""
        return style_of((await self.tokenizer()).chat_template or "", self._tool_call_parser)

    async def sampling(self, asked: Asked, num_prompt_tokens: int) -> Sampling:
        """Checked; without a limit an answer may fill the context."""
        about = await self.about()
        values = dict(asked.sampling)
        room = about["max_model_len"] - num_prompt_tokens
        values.setdefault("max_tokens", min(max(1, room), MAX_TOKENS))
        sampling = sampling_from(values)
        check_sampling(sampling, about["vocab_size"])
        check_priority(asked.priority)
        return sampling

    async def start(self, asked: Asked, prompt: Prompt, sampling: Sampling, number: int) -> Call:
        """Begin the answer with this number to a prompt; with a seed each has another."""
        if sampling.seed is not None and number:
            sampling = replace(sampling, seed=(sampling.seed + number) & MAX_SEED)
        tokenizer = await self.tokenizer()
        return await self.client.submit(
            packed(prompt.ids),
            sampling,
            detokenizer=Detokenizer(
                tokenizer,
                skip_special=asked.skip_special,
                continues=asked.messages is None,
                show=frozenset() if asked.tooling is None else (await self.style()).markers,
            ),
            stops=StopStrings(asked.stops) if asked.stops else None,
            slo=asked.slo,
            priority=asked.priority,
        )


def calls_or_result(message: Any) -> bool:
    """Whether a message of a conversation is about tools."""
    return isinstance(message, dict) and ("tool_calls" in message or message.get("role") == "tool")


def packed(ids: Sequence[int]) -> bytes:
    """As they travel."""
    try:
        return pack_ids(ids)
    except OverflowError:
        words = "prompt has a token id that is no 32-bit integer"
        raise HttpProblem(400, "invalid_request", words, "prompt") from None


async def beside(num_chars: int, work: Callable[[], Result]) -> Result:
    """Work on a text: in a thread, which tokenizers allow, where it would take long."""
    return await asyncio.to_thread(work) if num_chars > LONG_CHARS else work()


def size_of(message: Any) -> int:
    """Roughly the characters of a message."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return sum(len(text) for text in texts if isinstance(text, str))
    return len(content) if isinstance(content, str) else 0
