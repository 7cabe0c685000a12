"""/tokenize and /detokenize, in the form that vLLM has them."""

from typing import Any

from nodeserve.gateway.asked import Asked, variables_of
from nodeserve.gateway.engine import Engine, beside
from nodeserve.gateway.fields import Fields, is_ids
from nodeserve.gateway.logprobs import TokenTexts
from nodeserve.gateway.tool_fields import tooling_of
from nodeserve.types import shown


async def tokenized(engine: Engine, fields: Fields) -> dict[str, Any]:
    """Of a prompt or of messages: their number, the context's size, the ids."""
    ids = await _ids(engine, fields)
    texts = None
    if fields.read("return_token_strs"):
        text = TokenTexts(await engine.tokenizer(), as_ids=False).text
        texts = [text(token_id) for token_id in ids]
    limit = (await engine.about())["max_model_len"]
    return {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": texts}


async def _ids(engine: Engine, fields: Fields) -> list[int]:
    if "messages" in fields:
        asked = Asked(
            model=None,
            messages=_messages(fields),
            add_generation_prompt=fields.read("add_generation_prompt"),
            variables=variables_of(fields),
            tooling=tooling_of(fields),
        )
        return await engine.chat_ids(asked, fields.flag("add_special_tokens"))
    prompt = fields.read("prompt")
    if prompt is None:
        raise fields.error("prompt", "or messages must be given")
    tokenizer, add_special = await engine.tokenizer(), fields.flag("add_special_tokens", True)
    return await beside(len(prompt), lambda: tokenizer.encode(prompt, add_special=add_special))


def _messages(fields: Fields) -> list[Any]:
    messages = fields.read("messages")
    if not isinstance(messages, list):
        raise fields.error("messages", f"must be a list of messages, got {shown(messages)}")
    return messages


async def detokenized(engine: Engine, fields: Fields) -> dict[str, Any]:
    """The text of token ids, special ones included."""
    ids = fields.read("tokens")
    if not is_ids(ids) and ids != []:
        raise fields.error("tokens", f"must be a list of token ids, got {shown(ids)}")
    tokenizer = await engine.tokenizer()
    text = await beside(len(ids), lambda: tokenizer.decode(ids, skip_special=False))
    return {"prompt": text}
