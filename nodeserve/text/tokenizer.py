"""Text to token ids and back, for one checkpoint.

`encode` and the merges behind it are the `tokenizers` package's. Decoding is ours: every token is
a run of bytes (`Pieces`), so one piece of text decodes alike whole or in parts.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodeserve.errors import InvalidRequest, ModelError
from nodeserve.text.chat import ChatTemplate
from nodeserve.text.vocabulary import SPACE, Vocabulary
from nodeserve.types import brief

if TYPE_CHECKING:
    import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    def __init__(self, vocabulary: Vocabulary, location: str) -> None:
        self.location = location
        self.bos_token_id = vocabulary.bos_token_id
        self.eos_token_id = vocabulary.eos_token_id
        self.special_ids = vocabulary.special
        self.adds_space = vocabulary.adds_space
        self._encoder = vocabulary.encoder
        self._pieces = _pieces(vocabulary)
        self._text_pieces = _TextPieces(self._pieces, vocabulary.special)
        self._showing: dict[frozenset[str], Pieces] = {}
        self.chat_template = vocabulary.chat_template
        self._chat = (
            ChatTemplate(vocabulary.chat_template, vocabulary.template_tokens)
            if vocabulary.chat_template is not None
            else None
        )

    @classmethod
    def load(cls, location: str | Path) -> "Tokenizer":
        """From a .gguf file, or from a folder with tokenizer.json."""
        path = Path(location)
        if path.is_dir():
            from nodeserve.text import folder

            return cls(folder.read(path), str(path))
        from nodeserve.text import gguf_vocabulary

        return cls(gguf_vocabulary.read(path), str(path))

    @property
    def vocab_size(self) -> int:
        return self._encoder.get_vocab_size()

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        `add_special` adds what the model wants around a text (often a BOS token): leave it out
        for the result of `chat_prompt`, which brings its own. With `parse_special=False` text
        that looks like a special token is text.
        """
        encoder = self._encoder if parse_special else self._plain_encoder
        try:
            return encoder.encode(text, add_special_tokens=add_special).ids
        except (TypeError, UnicodeEncodeError):  # not a string, or lone surrogates in it
            raise InvalidRequest("prompt must be text that can be encoded as UTF-8") from None
        except Exception as error:  # noqa: BLE001  # the package raises nothing narrower
            raise ModelError(
                f"the tokenizer at {self.location} cannot encode this text: {brief(error)}"
            ) from None

    def decode(
        self, token_ids: Iterable[int], skip_special: bool = True, *, continues: bool = False
    ) -> str:
        """The text of `token_ids`; bytes that are no UTF-8 become U+FFFD, unknown ids nothing.

        `continues=True` for ids that go on after other text, such as a completion: then a
        leading space stays where encoding would have added one to a text of its own.
        """
        data = b"".join(map(self.pieces(skip_special).__getitem__, token_ids))
        text = data.decode("utf-8", "replace")
        return text.removeprefix(" ") if self.adds_space and not continues else text

    def pieces(self, skip_special: bool, show: frozenset[str] = frozenset()) -> "Pieces":
        """Each token's bytes; `show` are special tokens that are not skipped."""
        if not skip_special:
            return self._pieces
        shown_ids = {token_id for text in show if (token_id := self.special_id(text)) is not None}
        if not shown_ids:
            return self._text_pieces
        if show not in self._showing:
            self._showing[show] = _TextPieces(self._pieces, self.special_ids - shown_ids)
        return self._showing[show]

    def special_id(self, text: str) -> int | None:
        """The special token of this name."""
        token_id = self._encoder.token_to_id(text)
        return token_id if token_id in self.special_ids else None

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The conversation as the model's chat template writes it."""
        if self._chat is None:
            raise InvalidRequest(
                f"the model at {self.location} has no chat template: send a prompt instead, or "
                "add a chat_template.jinja to its folder"
            )
        return self._chat.render(messages, add_generation_prompt, variables)

    @cached_property
    def _plain_encoder(self) -> "tokenizers.Tokenizer":
        # An encoder of its own, since the switch is part of its state and threads may share us.
        from tokenizers import Tokenizer as Encoder

        encoder: Encoder = Encoder.from_str(self._encoder.to_str())
        encoder.encode_special_tokens = True
        return encoder


class Pieces(dict[int, bytes], ABC):
    """Token id to its bytes, worked out when first asked for. Unknown ids have none and are not
    kept: there are more of them than fit into memory."""

    def __missing__(self, token_id: int) -> bytes:
        piece = self._make(token_id)
        if piece is None:
            return b""
        self[token_id] = piece
        return piece

    @abstractmethod
    def _make(self, token_id: int) -> bytes | None:
        """None: there is no such token."""


class _TextPieces(Pieces):
    """As another, but special tokens have no text."""

    def __init__(self, pieces: Pieces, special: frozenset[int]) -> None:
        super().__init__(dict.fromkeys(special, b""))
        self._pieces = pieces

    def _make(self, token_id: int) -> bytes | None:
        piece = self._pieces[token_id]
        return piece if token_id in self._pieces else None


class _VocabularyPieces(Pieces):
    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self._added = vocabulary.added
        self._text_of = vocabulary.encoder.id_to_token

    def _make(self, token_id: int) -> bytes | None:
        try:
            text = self._text_of(token_id)
        except OverflowError:  # negative, or beyond 32 bits
            return None
        if text is None:
            return None
        return text.encode() if token_id in self._added else self._spell(text)

    @abstractmethod
    def _spell(self, text: str) -> bytes: ...


class _ByteLevelPieces(_VocabularyPieces):
    def _spell(self, text: str) -> bytes:
        try:
            return text.translate(_BYTE_OF_CHARACTER).encode("latin-1")
        except UnicodeEncodeError:  # not written in the byte alphabet: it stands for itself
            return text.encode()


class _SentencePieces(_VocabularyPieces):
    def _spell(self, text: str) -> bytes:
        if match := _BYTE_TOKEN.fullmatch(text):
            return bytes.fromhex(match[1])
        return text.replace(SPACE, " ").encode()


def _pieces(vocabulary: Vocabulary) -> Pieces:
    return (_ByteLevelPieces if vocabulary.byte_level else _SentencePieces)(vocabulary)


def _byte_of_character() -> dict[int, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other 68 bytes from U+0100 on.

    Characters below U+0100 that stand for no byte map out of Latin-1, so that encoding fails.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = dict.fromkeys(others, 0xFFFF)
    table.update({0x100 + i: byte for i, byte in enumerate(others)})
    return table


_BYTE_OF_CHARACTER = _byte_of_character()
