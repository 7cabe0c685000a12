"""Writes small GGUF files, independent of the reader: only what the tests need of the format."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
_TYPE_OF = {bool: 7, int: 4, float: 6, str: 8}
_FORMAT = {7: "<?", 4: "<I", 5: "<i", 6: "<f"}


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(item: Any) -> bytes:
    """A typed value; lists of integers are int32 arrays (as token types are)."""
    if isinstance(item, list):
        kind = 5 if item and isinstance(item[0], int) else _TYPE_OF[type(item[0])] if item else 8
        return struct.pack("<IIQ", 9, kind, len(item)) + b"".join(_plain(kind, i) for i in item)
    kind = _TYPE_OF[type(item)]
    return struct.pack("<I", kind) + _plain(kind, item)


def _plain(kind: int, item: Any) -> bytes:
    return string(item) if kind == 8 else struct.pack(_FORMAT[kind], item)


def gguf_bytes(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[tuple[int, ...], int, bytes]] | None = None,
    version: int = 3,
) -> bytes:
    """The file; a tensor is (shape outermost first, ggml type id, packed bytes)."""
    tensors = tensors or {}
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(string(key) + value(item) for key, item in metadata.items())
    offset, data = 0, b""
    for name, (shape, kind, packed) in tensors.items():
        dims = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += string(name) + struct.pack("<I", len(shape)) + dims
        head += struct.pack("<IQ", kind, offset)
        data += packed + b"\0" * (-len(packed) % 32)
        offset = len(data)
    return head + b"\0" * (-len(head) % 32) + data


def write_gguf(path: Path, *arguments: Any, **options: Any) -> Path:
    path.write_bytes(gguf_bytes(*arguments, **options))
    return path


def byte_alphabet() -> list[str]:
    """The 256 characters of GPT-2's byte-level vocabularies, by byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def gpt2_metadata(**changes: Any) -> dict[str, Any]:
    """A byte-level tokenizer: 256 bytes, a few merges, a control and a user-defined token."""
    merged = ["he", "ll", "hell", "hello", "Ġhello"]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello"]
    tokens = [*byte_alphabet(), *merged, "<bos>", "<eos>", "<own>"]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 261 + [3, 3, 4],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 261,
        "tokenizer.ggml.eos_token_id": 262,
        **changes,
    }


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    """A SentencePiece-like tokenizer: <unk>, two control tokens, 256 bytes, scored pieces."""
    pieces = ["▁", "h", "e", "l", "o", "he", "ll", "▁he", "llo", "▁hello", "w", "▁w"]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"]
        + [f"<0x{byte:02X}>" for byte in range(256)]
        + pieces,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **changes,
    }
