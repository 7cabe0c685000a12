"""What a request of OpenAI's API asks for, read from its JSON.

Fields that are not known are ignored: clients send new ones before servers know them. Fields that
are known to change the answer and that cannot be followed are refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nodeserve.gateway.fields import Fields, is_ids
from nodeserve.gateway.formats import constraint_of
from nodeserve.gateway.tables import CHAT, COMPLETION, MAX_CHOICES, VARIABLES
from nodeserve.gateway.tool_fields import Tooling, tooling_of
from nodeserve.types import SAMPLING_FIELDS, shown

NOT_YET: dict[str, tuple[Any, ...]] = {  # field: values that ask for nothing
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": ({},),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
NOT_IN_COMPLETIONS = {**NOT_YET, "suffix": ("",)}
NOT_IN_CHATS: dict[str, tuple[Any, ...]] = {
    **NOT_YET,
    "audio": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "web_search_options": (),
}
SLO_HEADERS = {"x-slo-ttft-ms": "ttft_ms", "x-slo-tpot-ms": "tpot_ms"}
_BY_THEIR_NAME = SAMPLING_FIELDS - {"max_tokens", "top_k", "logprobs", "logit_bias", "constraint"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One HTTP request. It has `prompts`, texts and lists of token ids, or `messages`."""

    model: str | None
    prompts: tuple[str | list[int], ...] = ()
    messages: list[Any] | None = None
    add_special: bool = True  # to prompts that are text
    add_generation_prompt: bool = True
    variables: dict[str, Any] = field(default_factory=dict)  # of the chat template
    tooling: Tooling | None = None  # of a chat
    sampling: dict[str, Any] = field(default_factory=dict)  # the fields of types.Sampling given
    constraint_field: str = ""  # that its `constraint` comes from
    stops: tuple[str, ...] = ()
    n: int = 1
    echo: bool = False
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    skip_special: bool = True
    token_ids: bool = False  # also in numbers
    timings: bool = False  # where its time went, too
    ids_as_tokens: bool = False  # "token_id:5" instead of a token's text in logprobs
    priority: int = 0  # as the server has it: the higher, the earlier
    slo: dict[str, float] | None = None
    repeated: dict[str, Any] = field(default_factory=dict)  # what a response says again


def completion_of(body: Mapping[str, Any], headers: Mapping[str, str]) -> Asked:
    """From the body of POST /v1/completions; BadField names what cannot be."""
    fields = Fields(body, COMPLETION)
    fields.only(NOT_IN_COMPLETIONS)
    common = common_of(fields, headers)
    prompts = prompts_of(fields)
    if len(prompts) * common["n"] > MAX_CHOICES:
        raise fields.error("prompt", f"times n gives more than {MAX_CHOICES} answers")
    if "best_of" in fields and fields.read("best_of") != common["n"]:
        raise fields.error("best_of", "must equal n: answers are not ranked")
    sampling = common["sampling"]
    sampling["max_tokens"] = fields.read("max_tokens")
    echo = fields.read("echo")
    if "logprobs" in fields:
        sampling["logprobs"] = fields.read("logprobs")
        if echo:
            raise fields.error("echo", "with logprobs needs those of the prompt, which are unknown")
    add_special = fields.read("add_special_tokens")
    return Asked(prompts=prompts, echo=echo, add_special=add_special, **common)


def chat_of(body: Mapping[str, Any], headers: Mapping[str, str]) -> Asked:
    """From the body of POST /v1/chat/completions; BadField names what cannot be."""
    fields = Fields(body, CHAT)
    fields.only(NOT_IN_CHATS)
    common = common_of(fields, headers)
    messages = fields.read("messages")
    if not isinstance(messages, list) or not messages:
        raise fields.error("messages", f"must be a list of messages, got {shown(messages)}")
    sampling = common["sampling"]
    for name in ("max_tokens", "max_completion_tokens"):  # the second has replaced the first
        limit = fields.read(name)
        if name in fields:
            sampling["max_tokens"] = limit
    top = fields.read("top_logprobs")
    if fields.read("logprobs"):
        sampling["logprobs"] = top
    elif top:
        raise fields.error("top_logprobs", "needs logprobs to be true")
    return Asked(
        messages=messages,
        add_generation_prompt=fields.read("add_generation_prompt"),
        variables=variables_of(fields),
        tooling=tooling_of(fields),
        **common,
    )


def common_of(fields: Fields, headers: Mapping[str, str]) -> dict[str, Any]:
    """What both kinds of request have whose answers are choices."""
    options = fields.read("stream_options")
    if "stream_options" in fields and not fields.read("stream"):
        raise fields.error("stream_options", "is for requests with stream: true")
    return {
        **shared_of(fields, headers),
        "n": fields.read("n"),
        "include_usage": options.read("include_usage"),
        "continuous_usage": options.read("continuous_usage_stats"),
        "token_ids": fields.read("return_token_ids"),
        "timings": fields.read("return_timings"),
        "ids_as_tokens": fields.read("return_tokens_as_token_ids"),
    }


def shared_of(fields: Fields, headers: Mapping[str, str]) -> dict[str, Any]:
    """What all requests for answers have."""
    sampling = sampling_of(fields)
    constraint_field, constraint = constraint_of(fields)
    if constraint is not None:
        sampling["constraint"] = constraint
    return {
        "model": fields.read("model"),
        "sampling": sampling,
        "constraint_field": constraint_field,
        "stops": fields.read("stop"),
        "stream": fields.read("stream"),
        "skip_special": fields.read("skip_special_tokens"),
        "priority": -fields.read("priority"),  # vLLM serves low numbers first
        "slo": slo_of(headers),
    }


def sampling_of(fields: Fields) -> dict[str, Any]:
    """The given fields of types.Sampling; their ranges are looked at where the model is known."""
    found = {name: fields.read(name) for name in _BY_THEIR_NAME if name in fields}
    if "top_k" in fields:
        top_k = fields.read("top_k")
        found["top_k"] = 0 if top_k == -1 else top_k  # -1: all of them, as vLLM's users write it
    if "logit_bias" in fields:
        found["logit_bias"] = bias_of(fields)
    return found


def bias_of(fields: Fields) -> dict[int, Any]:
    """JSON has no numbers as keys."""
    bias = fields.read("logit_bias")
    if not isinstance(bias, dict):
        raise fields.error("logit_bias", f"must map token ids to numbers, got {shown(bias)}")
    try:
        return {int(token_id): value for token_id, value in bias.items()}
    except ValueError as problem:
        raise fields.error("logit_bias", f"must have token ids as keys: {problem}") from None


def prompts_of(fields: Fields) -> tuple[str | list[int], ...]:
    """A text, token ids, or a list of either."""
    prompt = fields.read("prompt")
    if isinstance(prompt, str) or is_ids(prompt):
        return (prompt,)
    several = isinstance(prompt, list) and bool(prompt)
    if several and all(isinstance(one, str) or is_ids(one) for one in prompt):
        return tuple(prompt)
    words = "must be a string, a list of token ids, or a list of either"
    raise fields.error("prompt", f"{words}, got {shown(prompt)}")


def variables_of(fields: Fields) -> dict[str, Any]:
    """What the chat template is told beside the messages."""
    variables = fields.read("chat_template_kwargs")
    if variables is None:
        return {}
    if not isinstance(variables, dict):
        raise fields.error("chat_template_kwargs", f"must be an object, got {shown(variables)}")
    if taken := sorted(set(VARIABLES["properties"]) & set(variables)):
        raise fields.error("chat_template_kwargs", f"cannot have {taken[0]!r}")
    return variables


def slo_of(headers: Mapping[str, str]) -> dict[str, float] | None:
    """The objectives that the headers give; None where they give none."""
    slo: dict[str, float] = {}
    for header, name in SLO_HEADERS.items():
        if (text := headers.get(header)) is not None:
            slo[name] = milliseconds(header, text)
    return slo or None


def milliseconds(header: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise Fields({}).error(header, f"must be milliseconds above 0, got {shown(text)}")
    return value
