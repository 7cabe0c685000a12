"""What a request of OpenAI's API asks for, read from its JSON.

Fields that are not known are ignored: clients send new ones before servers know them. Fields that
are known to change the answer and that cannot be followed are refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nodeserve.gateway.fields import Fields, is_ids
from nodeserve.gateway.formats import constraint_of
from nodeserve.gateway.tool_fields import Tooling, tooling_of
from nodeserve.types import MAX_LOGPROBS, SAMPLING_FIELDS, shown

MAX_CHOICES = 1024  # answers to one request: prompts times n
MAX_N = 128
MAX_STOPS = 64
COMPLETION_TOKENS = 16  # of /v1/completions without max_tokens, as OpenAI has it
MAX_TOKENS = 2**31 - 1
OUR_ARGUMENTS = frozenset({"self", "messages", "add_generation_prompt", "tools"})
WORDS = "is not supported by this server"
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
    ids_as_tokens: bool = False  # "token_id:5" instead of a token's text in logprobs
    priority: int = 0  # as the server has it: the higher, the earlier
    slo: dict[str, float] | None = None


def completion_of(body: Mapping[str, Any], headers: Mapping[str, str]) -> Asked:
    """From the body of POST /v1/completions; BadField names what cannot be."""
    fields = Fields(body)
    fields.only(NOT_IN_COMPLETIONS, WORDS)
    common = common_of(fields, headers)
    prompts = prompts_of(fields)
    if len(prompts) * common["n"] > MAX_CHOICES:
        raise fields.error("prompt", f"times n gives more than {MAX_CHOICES} answers")
    if fields.whole("best_of", common["n"], 1, MAX_N) != common["n"]:
        raise fields.error("best_of", "must equal n: answers are not ranked")
    sampling = common["sampling"]
    sampling["max_tokens"] = fields.whole("max_tokens", COMPLETION_TOKENS, 1, MAX_TOKENS)
    echo = fields.flag("echo")
    if "logprobs" in fields:
        sampling["logprobs"] = fields.whole("logprobs", 0, 0, MAX_LOGPROBS)
        if echo:
            raise fields.error("echo", "with logprobs needs those of the prompt, which are unknown")
    add_special = fields.flag("add_special_tokens", True)
    return Asked(prompts=prompts, echo=echo, add_special=add_special, **common)


def chat_of(body: Mapping[str, Any], headers: Mapping[str, str]) -> Asked:
    """From the body of POST /v1/chat/completions; BadField names what cannot be."""
    fields = Fields(body)
    fields.only(NOT_IN_CHATS, WORDS)
    common = common_of(fields, headers)
    messages = fields.given("messages")
    if not isinstance(messages, list) or not messages:
        raise fields.error("messages", f"must be a list of messages, got {shown(messages)}")
    sampling = common["sampling"]
    for name in ("max_completion_tokens", "max_tokens"):  # the first has replaced the second
        if name in fields:
            sampling["max_tokens"] = fields.whole(name, 1, 1, MAX_TOKENS)
            break
    top = fields.whole("top_logprobs", 0, 0, MAX_LOGPROBS)
    if fields.flag("logprobs"):
        sampling["logprobs"] = top
    elif top:
        raise fields.error("top_logprobs", "needs logprobs to be true")
    return Asked(
        messages=messages,
        add_generation_prompt=fields.flag("add_generation_prompt", True),
        variables=variables_of(fields),
        tooling=tooling_of(fields),
        **common,
    )


def common_of(fields: Fields, headers: Mapping[str, str]) -> dict[str, Any]:
    """What both kinds of request have."""
    stream = fields.flag("stream")
    options = fields.inner("stream_options")
    if "stream_options" in fields and not stream:
        raise fields.error("stream_options", "is for requests with stream: true")
    sampling = sampling_of(fields)
    field_name, constraint = constraint_of(fields)
    if constraint is not None:
        sampling["constraint"] = constraint
    return {
        "model": fields.text("model"),
        "sampling": sampling,
        "constraint_field": field_name,
        "stops": fields.texts("stop", MAX_STOPS),
        "n": fields.whole("n", 1, 1, MAX_N),
        "stream": stream,
        "include_usage": options.flag("include_usage"),
        "continuous_usage": options.flag("continuous_usage_stats"),
        "skip_special": fields.flag("skip_special_tokens", True),
        "token_ids": fields.flag("return_token_ids"),
        "ids_as_tokens": fields.flag("return_tokens_as_token_ids"),
        # vLLM serves low numbers first.
        "priority": -fields.whole("priority", 0, -(2**31) + 1, 2**31 - 1),
        "slo": slo_of(headers),
    }


def sampling_of(fields: Fields) -> dict[str, Any]:
    """The given fields of types.Sampling; their ranges are looked at where the model is known."""
    found = {name: fields.given(name) for name in _BY_THEIR_NAME if name in fields}
    if "top_k" in fields:
        top_k = fields.given("top_k")
        found["top_k"] = 0 if top_k == -1 else top_k  # -1: all of them, as vLLM's users write it
    if "logit_bias" in fields:
        found["logit_bias"] = bias_of(fields)
    return found


def bias_of(fields: Fields) -> dict[int, Any]:
    """JSON has no numbers as keys."""
    bias = fields.given("logit_bias")
    if not isinstance(bias, dict):
        raise fields.error("logit_bias", f"must map token ids to numbers, got {shown(bias)}")
    try:
        return {int(token_id): value for token_id, value in bias.items()}
    except ValueError as problem:
        raise fields.error("logit_bias", f"must have token ids as keys: {problem}") from None


def prompts_of(fields: Fields) -> tuple[str | list[int], ...]:
    """A text, token ids, or a list of either."""
    prompt = fields.given("prompt")
    if isinstance(prompt, str) or is_ids(prompt):
        return (prompt,)
    several = isinstance(prompt, list) and bool(prompt)
    if several and all(isinstance(one, str) or is_ids(one) for one in prompt):
        return tuple(prompt)
    words = "must be a string, a list of token ids, or a list of either"
    raise fields.error("prompt", f"{words}, got {shown(prompt)}")


def variables_of(fields: Fields) -> dict[str, Any]:
    """What the chat template is told beside the messages."""
    variables = fields.given("chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        raise fields.error("chat_template_kwargs", f"must be an object, got {shown(variables)}")
    if taken := sorted(OUR_ARGUMENTS & set(variables)):
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
