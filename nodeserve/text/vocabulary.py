"""What a tokenizer is made of, whichever file format it was read from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nodeserve.errors import ModelError
from nodeserve.types import shown

if TYPE_CHECKING:
    import tokenizers

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space


@dataclass(frozen=True)
class Vocabulary:
    """What a reader of a file format (`folder`, `gguf_vocabulary`) makes of a tokenizer."""

    encoder: "tokenizers.Tokenizer"
    byte_level: bool  # GPT-2's alphabet of bytes; else SentencePiece's spaces and <0x..> tokens
    adds_space: bool  # encoding puts a space before the text, decoding takes it away
    added: frozenset[int]  # tokens outside the merges: their text stands for itself
    special: frozenset[int]  # those of them that are not text
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    chat_template: str | None = None
    template_tokens: Mapping[str, str] = field(default_factory=dict)  # bos_token, eos_token, ...


def check_token_id(token_id: object, size: int, name: str) -> int | None:
    """A special token's id as a file gives it; None where it gives none."""
    if token_id is None:
        return None
    if not isinstance(token_id, int) or not 0 <= token_id < size:
        raise ModelError(f"{name} is {shown(token_id)}, not one of the {size} tokens")
    return token_id
