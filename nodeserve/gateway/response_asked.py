"""What a request of /v1/responses asks for: one answer to a text or to messages.

Nothing is stored here, so what continues or fetches an earlier response is refused by name, as
are tools and everything else that is not text.
"""

from collections.abc import Mapping
from typing import Any

from nodeserve.gateway.asked import NOT_YET, Asked, shared_of, variables_of
from nodeserve.gateway.fields import Fields
from nodeserve.gateway.tables import INPUT_ITEM, INPUT_PART, METADATA, RESPONSE
from nodeserve.types import shown

NOT_IN_RESPONSES: dict[str, tuple[Any, ...]] = {
    **NOT_YET,
    "background": (False,),
    "chat_template": (),
    "conversation": (),
    "include": ([],),
    "n": (1,),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
ROLES = frozenset(INPUT_ITEM["properties"]["role"]["enum"])
TEXT_PARTS = frozenset(INPUT_PART["properties"]["type"]["enum"])


def response_of(body: Mapping[str, Any], headers: Mapping[str, str]) -> Asked:
    """From the body of POST /v1/responses; BadField names what cannot be."""
    fields = Fields(body, RESPONSE)
    fields.only(NOT_IN_RESPONSES)
    shared = shared_of(fields, headers)
    instructions, limit = fields.read("instructions"), fields.read("max_output_tokens")
    messages = [] if instructions is None else [{"role": "system", "content": instructions}]
    if "max_output_tokens" in fields:
        shared["sampling"]["max_tokens"] = limit
    return Asked(
        messages=messages + messages_of(fields),
        add_generation_prompt=fields.read("add_generation_prompt"),
        variables=variables_of(fields),
        repeated={
            "instructions": instructions,
            "max_output_tokens": limit if "max_output_tokens" in fields else None,
            "metadata": metadata_of(fields),
            "text": {"format": fields.read("text").given("format") or {"type": "text"}},
            **{name: shared["sampling"].get(name, 1.0) for name in ("temperature", "top_p")},
        },
        **shared,
    )


def messages_of(fields: Fields) -> list[dict[str, Any]]:
    """The input as a chat's messages."""
    given = fields.read("input")
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise fields.error("input", f"must be a text or a list of messages, got {shown(given)}")
    return [_message(fields, item, f"input[{number}]") for number, item in enumerate(given)]


def _message(fields: Fields, item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise fields.error(where, f"must be a message, got {shown(item)}")
    if item.get("type", "message") not in ("message", None):
        raise fields.error(f"{where}.type", f"must be message, got {shown(item['type'])}")
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(sorted(ROLES))
        raise fields.error(f"{where}.role", f"must be one of {known}, got {shown(role)}")
    if not isinstance(content, str):
        content = _text(fields, content, f"{where}.content")
    return {"role": "system" if role == "developer" else role, "content": content}


def _text(fields: Fields, content: Any, where: str) -> str:
    if not isinstance(content, list):
        raise fields.error(where, f"must be a text or a list of its parts, got {shown(content)}")
    return "\n".join(_part(fields, part, f"{where}[{i}]") for i, part in enumerate(content))


def _part(fields: Fields, part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in TEXT_PARTS:
        raise fields.error(f"{where}.type", f"must be input_text or output_text, got {shown(kind)}")
    if not isinstance(text := part.get("text"), str):
        raise fields.error(f"{where}.text", f"must be a string, got {shown(text)}")
    return text


def metadata_of(fields: Fields) -> dict[str, str]:
    """Up to 16 texts under names, as OpenAI has them."""
    given = fields.read("metadata")
    if given is None:
        return {}
    most, longest = METADATA["maxProperties"], METADATA["additionalProperties"]["maxLength"]
    if not isinstance(given, dict) or len(given) > most:
        raise fields.error("metadata", f"must be an object of at most {most} texts")
    for name, text in given.items():
        if len(name) > METADATA["propertyNames"]["maxLength"]:
            raise fields.error("metadata", f"has a name that is too long: {shown(name)}")
        if not isinstance(text, str) or len(text) > longest:
            words = f"must be a text of at most {longest} characters, got {shown(text)}"
            raise fields.error(f"metadata.{name}", words)
    return given
