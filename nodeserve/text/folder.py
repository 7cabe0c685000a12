"""A tokenizer from a folder of the hub: tokenizer.json and the JSON files beside it."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from nodeserve.errors import ModelError
from nodeserve.model_files import (
    MAX_TEMPLATE_BYTES,
    MAX_TOKENIZER_BYTES,
    read_json,
    read_text,
)
from nodeserve.text.vocabulary import Vocabulary
from nodeserve.types import brief

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


def read(folder: Path) -> Vocabulary:
    encoder = _encoder(folder / "tokenizer.json")
    config = _optional_json(folder / "special_tokens_map.json")
    config |= _optional_json(folder / "tokenizer_config.json")
    tokens = {name: text for name in _NAMED_TOKENS if (text := _token_text(config.get(name)))}
    added = encoder.get_added_tokens_decoder()
    byte_level, adds_space = _spelling(encoder, folder / "tokenizer.json")
    return Vocabulary(
        encoder=encoder,
        byte_level=byte_level,
        adds_space=adds_space,
        added=frozenset(added),
        special=frozenset(token_id for token_id, token in added.items() if token.special),
        bos_token_id=encoder.token_to_id(tokens.get("bos_token", "")),
        eos_token_id=encoder.token_to_id(tokens.get("eos_token", "")),
        chat_template=_chat_template(folder, config),
        template_tokens=tokens,
    )


def _encoder(path: Path) -> tokenizers.Tokenizer:
    text = read_text(path, MAX_TOKENIZER_BYTES)
    try:
        encoder: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001  # the package raises nothing narrower
        raise ModelError(f"{path} is not a tokenizer: {brief(error)}") from None
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def _spelling(encoder: tokenizers.Tokenizer, path: Path) -> tuple[bool, bool]:
    """From the decoder: whether tokens are in the byte alphabet, and whether it strips a space."""
    state: dict[str, Any] = {"type": None}
    if encoder.decoder is not None:
        state = json.loads(encoder.decoder.__getstate__())
    steps: list[dict[str, Any]] = state.get("decoders", [state])
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        return True, False
    if kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return False, any(_strips_space(step) for step in steps)
    raise ModelError(
        f"{path}: decoder {', '.join(sorted(map(str, kinds)))} is not supported, only ByteLevel "
        "and SentencePiece's"
    )


def _strips_space(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return bool(step["prepend_scheme"] != "never")
    return bool(step["type"] == "Strip" and step["content"] == " " and step["start"] > 0)


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _token_text(value: object) -> str | None:
    """A named token is its text, or an object that holds it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """From a file of its own, else from the configuration: one, or the default of several."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_text(path, MAX_TEMPLATE_BYTES)
    template = _optional_json(folder / "chat_template.json").get("chat_template")
    template = template or config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
