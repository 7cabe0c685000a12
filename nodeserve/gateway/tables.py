"""The fields that each route reads from a body: with these it is checked and described."""

from collections.abc import Mapping
from typing import Any

from nodeserve.gateway.kinds import (
    Flag,
    Given,
    Inner,
    Kind,
    Only,
    Schema,
    Text,
    Texts,
    Whole,
    object_schema,
    sampled,
)
from nodeserve.text.constraints import MAX_CHOICES as MAX_TEXTS
from nodeserve.types import MAX_LISTED, MAX_LOGPROBS, MAX_SEED

MAX_CHOICES = 1024  # answers to one request: prompts times n
MAX_N = 128
MAX_STOPS = 64
MAX_TOOLS = 128
COMPLETION_TOKENS = 16  # of /v1/completions without max_tokens, as OpenAI has it
MAX_TOKENS = 2**31 - 1
MAX_PRIORITY = 2**31 - 1

Table = Mapping[str, Kind]
Refused = Mapping[str, tuple[Any, ...]]  # field: values that ask for nothing

INT32: Schema = {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
IDS: Schema = {"type": "array", "items": INT32, "minItems": 1}
PROMPT: Schema = {
    "anyOf": [
        {"type": "string"},
        IDS,
        {"type": "array", "items": {"anyOf": [{"type": "string"}, IDS]}, "minItems": 1},
    ]
}
BIAS: Schema = {
    "type": "object",
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    "maxProperties": MAX_LISTED,
}
TEXT_PART: Schema = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
MESSAGE: Schema = {
    "type": "object",
    "properties": {
        "role": {"type": "string", "minLength": 1},
        "content": {
            "anyOf": [{"type": "string"}, {"type": "array", "items": TEXT_PART}, {"type": "null"}]
        },
        "tool_calls": {"description": "Of the role assistant: the calls of an earlier answer."},
        "tool_call_id": {"description": "Of the role tool: the call whose result this is."},
    },
    "required": ["role"],
}
MESSAGES: Schema = {"type": "array", "items": MESSAGE, "minItems": 1}
INPUT_PART: Schema = {
    "type": "object",
    "properties": {
        "type": {"enum": ["input_text", "output_text", "text"]},
        "text": {"type": "string"},
    },
    "required": ["type", "text"],
}
INPUT_ITEM: Schema = {
    "type": "object",
    "properties": {
        "type": {"enum": ["message", None]},
        "role": {"enum": ["assistant", "developer", "system", "user"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": INPUT_PART}]},
    },
    "required": ["role", "content"],
}
INPUT: Schema = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": INPUT_ITEM, "minItems": 1}]
}
METADATA: Schema = {
    "type": "object",
    "additionalProperties": {"type": "string", "maxLength": 512},
    "propertyNames": {"maxLength": 64},
    "maxProperties": 16,
}
VARIABLES: Schema = {
    "type": "object",
    "properties": {name: False for name in ("self", "messages", "add_generation_prompt", "tools")},
}

PLAIN_FORMAT: Schema = {
    "type": "object",
    "properties": {"type": {"enum": ["text", "json_object"]}},
    "required": ["type"],
}
JSON_SCHEMA: Schema = {"type": ["object", "boolean"]}
RESPONSE_FORMAT: Schema = {
    "anyOf": [
        PLAIN_FORMAT,
        {
            "type": "object",
            "properties": {
                "type": {"const": "json_schema"},
                "json_schema": {
                    "type": "object",
                    "properties": {"schema": JSON_SCHEMA},
                    "required": ["schema"],
                },
            },
            "required": ["type", "json_schema"],
        },
    ]
}
TEXT_FORMAT: Schema = {
    "anyOf": [
        PLAIN_FORMAT,
        {
            "type": "object",
            "properties": {"type": {"const": "json_schema"}, "schema": JSON_SCHEMA},
            "required": ["type", "schema"],
        },
    ]
}
PARAMETERS: Schema = {"type": "object", "properties": {"type": {"const": "object"}}}
FUNCTION_NAME: Schema = {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"}
CHOICE_OF_TOOLS: Schema = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "properties": {"name": {"type": "string"}},
                    "required": ["name"],
                },
            },
            "required": ["type", "function"],
        },
    ]
}

MODEL = Text("The served model's name; another is a 404.")
TEMPLATE: Table = {
    "add_generation_prompt": Flag("Begin the answer in the template's way.", True),
    "chat_template_kwargs": Given(VARIABLES, "What the chat template is told beside the messages."),
}
SAMPLING: Table = {
    "frequency_penalty": sampled("frequency_penalty"),
    "ignore_eos": Given({"type": "boolean"}, "Go on to max_tokens."),
    "logit_bias": Given(BIAS, "Token ids and what is added to their logits."),
    "min_p": sampled("min_p"),
    "min_tokens": sampled("min_tokens", "At most max_tokens."),
    "presence_penalty": sampled("presence_penalty"),
    "repetition_penalty": sampled("repetition_penalty"),
    "seed": Given({"type": "integer", "minimum": 0, "maximum": MAX_SEED}),
    "stop_token_ids": Given({"type": "array", "items": INT32, "maxItems": MAX_LISTED}),
    "temperature": sampled("temperature"),
    "top_k": Given({"type": "integer", "minimum": -1, "maximum": 2**31 - 1}, "-1 or 0: all."),
    "top_p": sampled("top_p"),
}
EXPRESSIONS: Table = {
    "choice": Given(
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_TEXTS},
        "The answer is one of these.",
    ),
    "grammar": Given({"type": "string", "minLength": 1}, "In Lark's notation, or GBNF."),
    "json": Given(
        {"anyOf": [{"type": ["object", "boolean"]}, {"type": "string", "minLength": 1}]},
        "A JSON schema, as it is or as text.",
    ),
    "regex": Given({"type": "string", "minLength": 1}),
}
NOT_STRUCTURED: Refused = {
    "disable_additional_properties": (False,),
    "disable_any_whitespace": (False,),
    "structural_tag": (),
    "whitespace_pattern": (),
}
STRUCTURED: Table = {
    **EXPRESSIONS,
    **{name: Only(harmless) for name, harmless in NOT_STRUCTURED.items()},
    "json_object": Flag("Any JSON object."),
}
FORMATS: Table = {
    **{f"guided_{name}": kind for name, kind in EXPRESSIONS.items()},
    "response_format": Given(RESPONSE_FORMAT, "What the answer must be."),
    "structured_outputs": Inner(STRUCTURED, "The same as vLLM has it; one of these."),
}
FUNCTION: Table = {
    "description": Text(),
    "name": Given(FUNCTION_NAME),
    "parameters": Given(PARAMETERS, "A JSON schema of an object; none: it takes no arguments."),
}
TOOL: Table = {
    "function": Inner(FUNCTION, required=("name",)),
    "type": Given({"const": "function"}),
}
TOOLS: Schema = {
    "type": "array",
    "items": object_schema(TOOL, ("function", "type")),
    "maxItems": MAX_TOOLS,
}
TOOLING: Table = {
    "parallel_tool_calls": Flag("Where a call is asked for, several may come.", True),
    "tool_choice": Given(CHOICE_OF_TOOLS, "Others than none and auto need tools."),
    "tools": Given(TOOLS, "Functions that the model may call, of different names."),
}
NOT_IN_TEXT: Refused = {"verbosity": ("medium",)}
TEXT: Table = {
    **{name: Only(harmless) for name, harmless in NOT_IN_TEXT.items()},
    "format": Given(TEXT_FORMAT, "What the answer must be."),
}
STREAM_OPTIONS: Table = {
    "continuous_usage_stats": Flag("Each event has the usage so far."),
    "include_usage": Flag("The last event has the usage."),
}
SHARED: Table = {  # of everything that answers
    **FORMATS,
    **SAMPLING,
    "model": MODEL,
    "priority": Whole(-MAX_PRIORITY, MAX_PRIORITY, 0, "Low numbers are served first."),
    "skip_special_tokens": Flag("Special tokens have no text.", True),
    "stop": Texts(MAX_STOPS, "The answer ends before these."),
    "stream": Flag("Answer with server-sent events."),
}
CHOICES: Table = {
    **SHARED,
    "n": Whole(1, MAX_N, 1, "Answers to each prompt."),
    "return_timings": Flag("Each answer says where its time went."),
    "return_token_ids": Flag("Prompt and answer also in numbers."),
    "return_tokens_as_token_ids": Flag('Logprobs name tokens "token_id:5".'),
    "stream_options": Inner(STREAM_OPTIONS, "Only with stream: true."),
}
COMPLETION: Table = {
    **CHOICES,
    "add_special_tokens": Flag("To prompts that are text.", True),
    "best_of": Whole(1, MAX_N, 1, "Must equal n: answers are not ranked."),
    "echo": Flag("The prompt in front of the answer; not with logprobs."),
    "logprobs": Whole(0, MAX_LOGPROBS, 0, "Also so many of the most likely tokens."),
    "max_tokens": Whole(1, MAX_TOKENS, COMPLETION_TOKENS),
    "prompt": Given(PROMPT, "A text, token ids, or a list of either."),
}
CHAT: Table = {
    **CHOICES,
    **TEMPLATE,
    **TOOLING,
    "logprobs": Flag("The log probability of each token."),
    "max_completion_tokens": Whole(1, MAX_TOKENS, 1, "What is left of the context."),
    "max_tokens": Whole(1, MAX_TOKENS, 1, "The old name of max_completion_tokens."),
    "messages": Given(MESSAGES),
    "top_logprobs": Whole(0, MAX_LOGPROBS, 0, "Only with logprobs: true."),
}
RESPONSE: Table = {
    **SHARED,
    **TEMPLATE,
    "input": Given(INPUT, "A text, or messages."),
    "instructions": Text("What stands in front of the input, as the system says it."),
    "max_output_tokens": Whole(1, MAX_TOKENS, 1, "What is left of the context."),
    "metadata": Given(METADATA, "Comes back as it is."),
    "text": Inner(TEXT, "The place that OpenAI has for an answer's format."),
}
TOKENIZE: Table = {
    **TEMPLATE,
    **TOOLING,
    "add_special_tokens": Given({"type": "boolean"}, "Default: for a prompt, not for messages."),
    "messages": Given(MESSAGES, "Or a prompt."),
    "model": MODEL,
    "prompt": Text("Or messages."),
    "return_token_strs": Flag("Each token's text as well."),
}
DETOKENIZE: Table = {
    "model": MODEL,
    "tokens": Given({"type": "array", "items": {"type": "integer"}}),
}
