"""What answers look like, as JSON schemas for /openapi.json.

Objects have these members and no others, so that tests find what is not described.
"""

from dataclasses import fields
from typing import Any

from nodeserve.gateway.kinds import Schema
from nodeserve.gateway.responses import NOT_HERE
from nodeserve.gateway.tables import TEXT_FORMAT
from nodeserve.types import Timings

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}


def listed(items: Schema | bool) -> Schema:
    return {"type": "array", "items": items}


def maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, NULL]}


def known(*values: object) -> Schema:
    return {"enum": list(values)}


def record(optional: tuple[str, ...] = (), /, **members: Schema) -> Schema:
    """An object with these members; the `optional` ones may be missing."""
    return {
        "type": "object",
        "properties": members,
        "required": [name for name in members if name not in optional],
        "additionalProperties": False,
    }


def named(name: str) -> Schema:
    """A schema of SCHEMAS."""
    return {"$ref": f"#/components/schemas/{name}"}


IDS = listed({"type": "integer"})
FINISH = known("stop", "length")
CHAT_FINISH = known("stop", "length", "tool_calls")
CALL = record(
    id=TEXT, type=known("function"), function=record(name=TEXT, arguments=TEXT)
)  # a whole one
CALL_PART = record(
    ("id", "type"),
    index=COUNT,
    id=TEXT,
    type=known("function"),
    function=record(("name",), name=TEXT, arguments=TEXT),
)
PIECE = {"token": TEXT, "logprob": NUMBER, "bytes": IDS}
SPENT: dict[Any, Schema] = {  # a worker that nobody was has the number -1
    float: NUMBER,
    int: {"type": "integer", "minimum": -1},
}
ABOUT = {"id": TEXT, "created": COUNT, "model": TEXT}

RESPONSE, MESSAGE, PART = named("Response"), named("OutputMessage"), named("OutputText")
PLACE = {"item_id": TEXT, "output_index": COUNT, "content_index": COUNT}


def event(*names: str, **members: Schema) -> Schema:
    """One of /v1/responses."""
    kind = known(*(f"response.{name}" for name in names))
    return record(type=kind, sequence_number=COUNT, **members)


SCHEMAS: dict[str, Schema] = {
    "Error": record(
        error=record(
            message=TEXT,
            type=known(
                "authentication_error",
                "invalid_request_error",
                "permission_error",
                "rate_limit_error",
                "server_error",
            ),
            param=maybe(TEXT),
            code=TEXT,
        )
    ),
    "Usage": record(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT),
    "Timings": record(**{one.name: SPENT[one.type] for one in fields(Timings)}),
    "CompletionLogprobs": record(
        tokens=listed(TEXT),
        token_logprobs=listed(NUMBER),
        top_logprobs=listed(maybe({"type": "object", "additionalProperties": NUMBER})),
        text_offset=listed(COUNT),
    ),
    "ChatLogprobs": record(
        content=listed(record(**PIECE, top_logprobs=listed(record(**PIECE)))), refusal=NULL
    ),
    "Completion": record(
        **ABOUT,
        object=known("text_completion"),
        choices=listed(
            record(
                ("token_ids", "prompt_token_ids", "timings"),
                index=COUNT,
                text=TEXT,
                logprobs=maybe(named("CompletionLogprobs")),
                finish_reason=FINISH,
                token_ids=IDS,
                timings=named("Timings"),
                prompt_token_ids=IDS,
            )
        ),
        usage=named("Usage"),
    ),
    "ChatCompletion": record(
        ("prompt_token_ids",),
        **ABOUT,
        object=known("chat.completion"),
        choices=listed(
            record(
                ("token_ids", "timings"),
                index=COUNT,
                message=record(
                    ("tool_calls",),
                    role=known("assistant"),
                    content=maybe(TEXT),  # null beside calls
                    refusal=NULL,
                    tool_calls=listed(CALL),
                ),
                logprobs=maybe(named("ChatLogprobs")),
                finish_reason=CHAT_FINISH,
                token_ids=IDS,
                timings=named("Timings"),
            )
        ),
        usage=named("Usage"),
        prompt_token_ids=IDS,
    ),
    "CompletionEvent": record(
        ("usage",),
        **ABOUT,
        object=known("text_completion"),
        choices=listed(
            record(
                ("token_ids", "prompt_token_ids", "timings"),
                index=COUNT,
                text=TEXT,
                logprobs=maybe(named("CompletionLogprobs")),
                finish_reason=maybe(FINISH),
                token_ids=IDS,
                timings=named("Timings"),
                prompt_token_ids=IDS,
            )
        ),
        usage=maybe(named("Usage")),
    ),
    "ChatCompletionEvent": record(
        ("usage", "prompt_token_ids"),
        **ABOUT,
        object=known("chat.completion.chunk"),
        choices=listed(
            record(
                ("token_ids", "timings"),
                index=COUNT,
                delta=record(
                    ("role", "content", "tool_calls"),
                    role=known("assistant"),
                    content=TEXT,
                    tool_calls=listed(CALL_PART),
                ),
                logprobs=maybe(named("ChatLogprobs")),
                finish_reason=maybe(CHAT_FINISH),
                token_ids=IDS,
                timings=named("Timings"),
            )
        ),
        usage=maybe(named("Usage")),
        prompt_token_ids=IDS,
    ),
    "OutputText": record(
        type=known("output_text"), text=TEXT, annotations=listed(False), logprobs=listed(False)
    ),
    "OutputMessage": record(
        id=TEXT,
        type=known("message"),
        role=known("assistant"),
        status=known("in_progress", "completed", "incomplete"),
        content=listed(named("OutputText")),
    ),
    "ResponseUsage": record(
        input_tokens=COUNT,
        input_tokens_details=record(cached_tokens=COUNT, cache_write_tokens=COUNT),
        output_tokens=COUNT,
        output_tokens_details=record(reasoning_tokens=COUNT),
        total_tokens=COUNT,
    ),
    "Response": record(
        id=TEXT,
        object=known("response"),
        created_at=COUNT,
        model=TEXT,
        status=known("in_progress", "completed", "incomplete", "failed"),
        output=listed(named("OutputMessage")),
        error=maybe(record(code=known("server_error", "rate_limit_exceeded"), message=TEXT)),
        incomplete_details=maybe(record(reason=known("max_output_tokens"))),
        usage=maybe(named("ResponseUsage")),
        instructions=maybe(TEXT),
        max_output_tokens=maybe(COUNT),
        metadata={"type": "object", "additionalProperties": TEXT},
        text=record(format=TEXT_FORMAT),
        temperature=NUMBER,
        top_p=NUMBER,
        **{name: known(value) for name, value in NOT_HERE.items()},
    ),
    "ResponseEvent": {
        "anyOf": [
            event("created", "in_progress", "completed", "incomplete", "failed", response=RESPONSE),
            event("output_item.added", "output_item.done", output_index=COUNT, item=MESSAGE),
            event("content_part.added", "content_part.done", **PLACE, part=PART),
            event("output_text.delta", **PLACE, delta=TEXT, logprobs=listed(False)),
            event("output_text.done", **PLACE, text=TEXT, logprobs=listed(False)),
        ]
    },
    "Model": record(
        id=TEXT,
        object=known("model"),
        created=COUNT,
        owned_by=TEXT,
        root=TEXT,
        parent=NULL,
        max_model_len=COUNT,
    ),
    "Models": record(object=known("list"), data=listed(named("Model"))),
    "Tokenized": record(
        count=COUNT, max_model_len=COUNT, tokens=IDS, token_strs=maybe(listed(TEXT))
    ),
    "Detokenized": record(prompt=TEXT),
    "Version": record(version=TEXT),
    "Live": record(status=known("live")),
    "Ready": record(status=known("ready", "degraded"), reasons=listed(TEXT)),
}
