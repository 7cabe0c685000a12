"""The JSON of /v1/responses: a response whole, or the events by which it comes to be."""

from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from nodeserve.client import Chunk, Completion, Usage
from nodeserve.errors import NodeServeError
from nodeserve.gateway.asked import Asked
from nodeserve.gateway.problems import status_of
from nodeserve.gateway.shapes import Choice, Shape, compact

INCOMPLETE = {"length": "max_output_tokens"}  # by the reason that an answer ended
NOT_HERE: dict[
    str, Any
] = {  # what a response has in OpenAI's form and this server never does otherwise
    "background": False,
    "parallel_tool_calls": False,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "service_tier": "default",
    "store": False,
    "tool_choice": "auto",
    "tools": [],
    "truncation": "disabled",
}


class ResponseShape(Shape):
    """One message of one text."""

    prefix = "resp_"

    def __init__(self, asked: Asked, request_id: str, model: str, created_s: int) -> None:
        super().__init__(asked, request_id, model, created_s)
        self._message_id = "msg_" + request_id
        self._place = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        self._number = 0  # of the next event
        self._texts: list[str] = []
        self._last: Chunk | None = None
        head = compact({"type": "response.output_text.delta", **self._place, "logprobs": []})
        self._delta = f'event: response.output_text.delta\ndata: {head[:-1]},"sequence_number":'

    # ---- whole

    def whole(self, choices: Sequence[Choice], done: Sequence[Completion]) -> dict[str, Any]:
        (one,) = done
        return self._ended(one.text, one.finish_reason, one.usage)

    def _ended(self, text: str, reason: str, usage: Usage) -> dict[str, Any]:
        cut = INCOMPLETE.get(reason)
        status = "completed" if cut is None else "incomplete"
        return {
            **self._response(status, [self._message(status, [self._part(text)])]),
            "incomplete_details": None if cut is None else {"reason": cut},
            "usage": usage_object(usage),
        }

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_s,
            "model": self.model,
            "status": status,
            "output": output,
            "error": None,
            "incomplete_details": None,
            "usage": None,
            **NOT_HERE,
            **self.asked.repeated,
        }

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        about = {"id": self._message_id, "type": "message", "role": "assistant"}
        return {**about, "status": status, "content": content}

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    # ---- streams

    def events(self, choice: Choice, chunk: Chunk) -> bytes:
        first = b"" if choice.begun else self._begin()
        choice.begun = True
        if chunk.finish_reason is not None:
            self._last = chunk
        if not chunk.text:
            return first
        self._texts.append(chunk.text)
        number, self._number = self._number, self._number + 1
        return first + f'{self._delta}{number},"delta":{quoted(chunk.text)}}}\n\n'.encode()

    def ended(self, choices: Sequence[Choice], num_tokens: int) -> bytes:
        last, text = self._last, "".join(self._texts)
        assert last is not None and last.finish_reason is not None and last.usage is not None
        response = self._ended(text, last.finish_reason, last.usage)
        (message,) = response["output"]
        return b"".join(
            [
                self._event("output_text.done", {**self._place, "text": text, "logprobs": []}),
                self._event("content_part.done", {**self._place, "part": self._part(text)}),
                self._event("output_item.done", {"output_index": 0, "item": message}),
                self._event(response["status"], {"response": response}),
            ]
        )

    def failed(self, error: NodeServeError) -> bytes:
        code = "rate_limit_exceeded" if status_of(error) == 429 else "server_error"
        message = self._message("incomplete", [self._part("".join(self._texts))])
        response = self._response("failed", [message])
        response["error"] = {"code": code, "message": str(error)}
        return self._event("failed", {"response": response})

    def _begin(self) -> bytes:
        response = self._response("in_progress", [])
        message = self._message("in_progress", [])
        return b"".join(
            [
                self._event("created", {"response": response}),
                self._event("in_progress", {"response": response}),
                self._event("output_item.added", {"output_index": 0, "item": message}),
                self._event("content_part.added", {**self._place, "part": self._part("")}),
            ]
        )

    def _event(self, name: str, values: dict[str, Any]) -> bytes:
        number, self._number = self._number, self._number + 1
        data = {"type": f"response.{name}", "sequence_number": number, **values}
        return f"event: response.{name}\ndata: {compact(data)}\n\n".encode()


def usage_object(usage: Usage) -> dict[str, Any]:
    """Of prompts nothing is cached here, and nothing is reasoned apart from the answer."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }
