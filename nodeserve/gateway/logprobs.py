"""Log probabilities with the tokens' texts, in the two forms that OpenAI's API has for them."""

from collections.abc import Sequence
from typing import Any

from nodeserve.text import Tokenizer
from nodeserve.types import TokenLogprobs

LEAST = -9999.0  # what OpenAI writes for what cannot be; JSON has no infinity


class TokenTexts:
    """How single tokens are shown. A token may be a part of a character: then it is U+FFFD."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool) -> None:
        self._bytes = tokenizer.pieces(skip_special=False)
        self._as_ids = as_ids

    def text(self, token_id: int) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        return self._bytes[token_id].decode("utf-8", "replace")

    def numbers(self, token_id: int) -> list[int]:
        """Its bytes."""
        return list(self._bytes[token_id])


def completion_logprobs(
    texts: TokenTexts, ids: Sequence[int], entries: Sequence[TokenLogprobs], offset: int
) -> tuple[dict[str, Any], int]:
    """Lists with an entry for each token, whose texts begin at `offset`; and where they end."""
    tokens = [texts.text(token_id) for token_id in ids]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [_bounded(entry.logprob) for entry in entries],
        "top_logprobs": [
            _with_chosen(texts, token, entry) if entry.top else None
            for token, entry in zip(tokens, entries, strict=True)
        ],
        "text_offset": offsets,
    }, offset


def _with_chosen(texts: TokenTexts, token: str, entry: TokenLogprobs) -> dict[str, float]:
    """The most likely ones by their text, and the chosen one. Of several with one text the most
    likely counts."""
    top: dict[str, float] = {}
    for token_id, logprob in entry.top.items():
        top.setdefault(texts.text(token_id), _bounded(logprob))
    top.setdefault(token, _bounded(entry.logprob))
    return top


def chat_logprobs(
    texts: TokenTexts, ids: Sequence[int], entries: Sequence[TokenLogprobs]
) -> dict[str, Any]:
    """An object for each token, with its most likely alternatives."""
    return {
        "content": [
            {
                **_named(texts, token_id, entry.logprob),
                "top_logprobs": [_named(texts, other, value) for other, value in entry.top.items()],
            }
            for token_id, entry in zip(ids, entries, strict=True)
        ],
        "refusal": None,
    }


def _named(texts: TokenTexts, token_id: int, logprob: float) -> dict[str, Any]:
    token, numbers = texts.text(token_id), texts.numbers(token_id)
    return {"token": token, "logprob": _bounded(logprob), "bytes": numbers}


def _bounded(logprob: float) -> float:
    return max(LEAST, logprob)  # in this order also of a NaN, which compares with nothing
