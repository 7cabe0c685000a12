"""Turns a stream of token ids into a stream of text, whole characters only, up to a stop string.

Every token stands for a fixed run of bytes, whatever its neighbours are, so the text of a stream
is the UTF-8 decoding of the joined bytes and needs no second look at earlier tokens. A character
whose bytes are not all there waits; bytes that cannot become a character are U+FFFD, exactly as
when all is decoded at once.
"""

import codecs
from collections.abc import Iterable

from nodeserve.errors import InvalidRequest
from nodeserve.text.tokenizer import Tokenizer

_Utf8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Text of one request. For any chunking, joined: `tokenizer.decode` of all ids with the
    same arguments (`continues` says that the ids continue a text, see there)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special: bool = True,
        continues: bool = False,
        show: frozenset[str] = frozenset(),
    ) -> None:
        """`show`: special tokens that are text all the same."""
        self._piece = tokenizer.pieces(skip_special, show).__getitem__
        self._decode = _Utf8("replace").decode
        self._drop_space = tokenizer.adds_space and not continues

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        return self._begin(self._decode(b"".join(map(self._piece, token_ids))))

    def finish(self) -> str:
        """What was held back: nothing, or U+FFFD for a character that never became whole."""
        return self._begin(self._decode(b"", True))

    def _begin(self, text: str) -> str:
        if self._drop_space and text:
            self._drop_space = False
            return text.removeprefix(" ")
        return text


class StopStrings:
    """Ends a stream of text at the first stop string, which is not part of the text.

    First is what ends first, and of those the longest: so the answer does not depend on how the
    text was cut into chunks. Text that may be the beginning of a stop string is held back.
    """

    def __init__(self, stops: str | Iterable[str]) -> None:
        self.stops = (stops,) if isinstance(stops, str) else tuple(stops)
        for stop in self.stops:
            if not isinstance(stop, str) or not stop:
                raise InvalidRequest(f"stop must be strings that are not empty, got {stop!r}")
        self._held = ""
        self._hit = False

    def push(self, text: str) -> tuple[str, bool]:
        """Text to emit now, and whether a stop string was found (then all is over)."""
        if self._hit:
            return "", True
        text = self._held + text
        if (start := self._first(text)) is not None:
            self._held, self._hit = "", True
            return text[:start], True
        keep = len(text) - self._beginning(text)
        self._held = text[keep:]
        return text[:keep], False

    def finish(self) -> str:
        """The text still held back, when the stream ends without a stop string."""
        text, self._held = self._held, ""
        return text

    def _first(self, text: str) -> int | None:
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _beginning(self, text: str) -> int:
        """How many characters at the end of `text` begin a stop string, at most."""
        longest = 0
        for stop in self.stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
