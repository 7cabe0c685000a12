"""A tokenizer rebuilt from the metadata of a GGUF file, to give the ids that llama.cpp gives.

Two kinds: GPT-2's (merges over an alphabet of bytes; how text is cut into words beforehand goes by
a name, `tokenizer.ggml.pre`) and SentencePiece's as Llama 2 has it (scores instead of merges,
unknown characters spelled in bytes). llama.cpp is the reference because GGUF files are made for
it; where its patterns differ from the original model's, they are followed.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as pre

from nodeserve.errors import ModelError
from nodeserve.gguf import GgufFile, StringArray
from nodeserve.text.vocabulary import SPACE, Vocabulary, check_token_id
from nodeserve.types import brief, shown

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # token types

MAX_TOKEN_CHARACTERS = 4096  # of one token; cutting it in two has as many ways
MAX_CHARACTERS = 1 << 24  # of all tokens
MAX_TEMPLATE_CHARACTERS = 1 << 20

_DIGIT = r"\p{N}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}"
_LOWER, _UPPER = r"(?=\p{L})[^A-Z]", r"(?=\p{L})[^a-z]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?(?:{_UPPER})*(?:{_LOWER})+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?(?:{_UPPER})+(?:{_LOWER})*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

_WORDS = {  # patterns applied one after the other, each to what the one before cut out
    "default": _DEFAULT,
    **dict.fromkeys(["gpt-2", "olmo", "mpt", "jais", "trillion", "gigachat", "mellum"], (_GPT2,)),
    **dict.fromkeys(
        ["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
        (_DIGIT, _GPT2),
    ),
    **dict.fromkeys(
        ["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe"], (_LLAMA3,)
    ),
    **dict.fromkeys(["qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"], (_QWEN2,)),
    "tekken": (_TEKKEN,),
}
# A word that is a token stays whole, merges or not; and a BOS token comes first unless denied.
_WHOLE_WORDS = frozenset(["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"])


def read(path: Path) -> Vocabulary:
    file = GgufFile(path)
    fields = _Metadata(file)
    match fields.text("model"):
        case "gpt2":
            return _gpt2(fields)
        case "llama":
            return _sentencepiece(fields)
        case kind:
            raise ModelError(
                f"{path}: tokenizer {shown(kind)} is not supported, only gpt2 and llama"
            )


class _Metadata:
    """The keys below `tokenizer.`, with their types checked."""

    def __init__(self, file: GgufFile) -> None:
        self.path = file.path
        self.values = file.metadata
        self.tokens = self.strings("tokens")
        self._check_lengths()
        self.types = self.numbers("token_type", default=1)
        self.of_type = {
            kind: [i for i, value in enumerate(self.types) if value == kind]
            for kind in (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)
        }

    def get(self, name: str) -> Any:
        return self.values.get(f"tokenizer.ggml.{name}")

    def text(self, name: str, default: str | None = None) -> str:
        value = default if self.get(name) is None else self.get(name)
        if not isinstance(value, str):
            raise ModelError(
                f"{self.path}: tokenizer.ggml.{name} is {shown(value)}, must be a string"
            )
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        return value if isinstance(value, bool) else default

    def strings(self, name: str) -> list[str]:
        value = self.get(name)
        if not isinstance(value, StringArray):
            raise ModelError(f"{self.path} has no tokenizer.ggml.{name}")
        return value.strings()

    def numbers(self, name: str, default: int | None = None) -> list[Any]:
        value = self.get(name)
        if value is None and default is not None:
            return [default] * len(self.tokens)
        if isinstance(value, str | bool | int | float | StringArray | None) or len(value) != len(
            self.tokens
        ):
            raise ModelError(f"{self.path}: tokenizer.ggml.{name} needs a number for each token")
        return list(value)

    def token_id(self, name: str) -> int | None:
        key = f"{name}_token_id"
        return check_token_id(self.get(key), len(self.tokens), f"{self.path}: {key}")

    def chat_template(self) -> str | None:
        value = self.values.get("tokenizer.chat_template")
        if isinstance(value, str) and len(value) > MAX_TEMPLATE_CHARACTERS:
            raise ModelError(f"{self.path}: a chat template of {len(value)} characters")
        return value if isinstance(value, str) else None

    def _check_lengths(self) -> None:
        longest, total = max(map(len, self.tokens), default=0), sum(map(len, self.tokens))
        if longest > MAX_TOKEN_CHARACTERS or total > MAX_CHARACTERS:
            raise ModelError(
                f"{self.path}: tokens of up to {longest} characters, {total} in all; at most"
                f" {MAX_TOKEN_CHARACTERS} and {MAX_CHARACTERS} are taken"
            )


def _gpt2(fields: _Metadata) -> Vocabulary:
    name = fields.text("pre", "default")
    if name not in _WORDS:
        raise ModelError(
            f"{fields.path}: pre-tokenizer {shown(name)} is not supported, only "
            f"{', '.join(sorted(_WORDS))} (or serve the model from safetensors)"
        )
    vocab = {text: i for i, text in enumerate(fields.tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in fields.strings("merges")]
    whole_words = name in _WHOLE_WORDS
    encoder = _bpe(fields, vocab, merges, ignore_merges=whole_words)
    splits = [pre.Split(Regex(pattern), "isolated") for pattern in _WORDS[name]]
    encoder.pre_tokenizer = pre.Sequence(
        [*splits, pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    encoder.decoder = decoders.ByteLevel()
    return _vocabulary(fields, encoder, byte_level=True, adds_space=False, adds_bos=whole_words)


def _sentencepiece(fields: _Metadata) -> Vocabulary:
    vocab = {text: i for i, text in enumerate(fields.tokens)}
    unknown = fields.of_type[_UNKNOWN]
    encoder = _bpe(
        fields,
        vocab,
        list(_merges_by_score(vocab, fields)),
        byte_fallback=True,
        unk_token=fields.tokens[unknown[0]] if unknown else None,
    )
    adds_space = fields.flag("add_space_prefix", True)
    replace = normalizers.Replace(" ", SPACE)
    encoder.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if adds_space else replace
    )
    strip = [decoders.Strip(" ", 1, 0)] if adds_space else []
    encoder.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return _vocabulary(fields, encoder, byte_level=False, adds_space=adds_space, adds_bos=True)


def _merges_by_score(vocab: Mapping[str, int], fields: _Metadata) -> Iterator[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union has the highest score: every way to cut a
    token in two tokens is a merge, in the order of the scores of what they make.

    Text never merges into a control token or a byte, even where all its parts are tokens.
    """
    scores = fields.numbers("scores")
    apart = {i for kind in (_UNKNOWN, _CONTROL, _BYTE) for i in fields.of_type[kind]}
    for text, token_id in sorted(vocab.items(), key=lambda item: -scores[item[1]]):
        if token_id in apart:
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab:
                yield left, right


def _bpe(fields: _Metadata, vocab: dict[str, int], merges: list[Any], **options: Any) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    except Exception as error:  # noqa: BLE001  # the package raises nothing narrower
        raise ModelError(f"{fields.path}: tokens and merges do not fit: {brief(error)}") from None


def _vocabulary(
    fields: _Metadata, encoder: Tokenizer, *, byte_level: bool, adds_space: bool, adds_bos: bool
) -> Vocabulary:
    special = fields.of_type[_UNKNOWN] + fields.of_type[_CONTROL]
    own_text = fields.of_type[_USER_DEFINED]
    encoder.add_special_tokens([_added(fields.tokens[i], True) for i in special])
    encoder.add_tokens([_added(fields.tokens[i], False) for i in own_text])
    named = {name: fields.token_id(name) for name in ("bos", "eos", "unknown", "padding")}
    _add_ends(
        encoder,
        bos=named["bos"] if fields.flag("add_bos_token", adds_bos) else None,
        eos=named["eos"] if fields.flag("add_eos_token", False) else None,
    )
    template_names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    return Vocabulary(
        encoder=encoder,
        byte_level=byte_level,
        adds_space=adds_space,
        added=frozenset(special + own_text),
        special=frozenset(special),
        bos_token_id=named["bos"],
        eos_token_id=named["eos"],
        chat_template=fields.chat_template(),
        template_tokens={
            f"{template_names[name]}_token": fields.tokens[token_id]
            for name, token_id in named.items()
            if token_id is not None
        },
    )


def _added(text: str, special: bool) -> AddedToken:
    return AddedToken(text, normalized=False, special=special)


def _add_ends(encoder: Tokenizer, bos: int | None, eos: int | None) -> None:
    """Put BOS and EOS around what is encoded with special tokens."""
    ends = {"bos": bos, "eos": eos}
    present = [(name, token_id) for name, token_id in ends.items() if token_id is not None]
    if present:
        order = ["bos"] * (bos is not None) + ["$A"] + ["eos"] * (eos is not None)
        encoder.post_processor = processors.TemplateProcessing(
            single=" ".join(order), special_tokens=present
        )
