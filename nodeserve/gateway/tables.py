"""The fields that each route reads from a body: with these it is checked and described."""

from collections.abc import Mapping
from typing import Any

from nodeserve.gateway.kinds import (
    Flag,
    Given,
    Inner,
    Kind,
    Schema,
    Text,
    Texts,
    Whole,
    sampled,
)
from nodeserve.types import MAX_LISTED, MAX_LOGPROBS, MAX_SEED

MAX_CHOICES = 1024  # answers to one request: prompts times n
MAX_N = 128
MAX_STOPS = 64
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
    "properties": {name: False for name in ("self", "messages", "add_generation_prompt")},
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
STREAM_OPTIONS: Table = {
    "continuous_usage_stats": Flag("Each event has the usage so far."),
    "include_usage": Flag("The last event has the usage."),
}
SHARED: Table = {  # of everything that answers
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
}
TOKENIZE: Table = {
    **TEMPLATE,
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
