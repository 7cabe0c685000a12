"""A small vocabulary of the kind that Llama 2 has: pieces with scores, byte fallback."""

from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
CONTROL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
OWN = ["<own>"]


def train_pieces(lines: list[str]) -> list[str]:
    """Merged pieces in the order they were found, then the characters they begin with.

    Left out are NUL, where llama.cpp ends a string, and what it takes for control tokens by
    their text alone (SentencePiece does not, nor do we).
    """
    lines = [line for line in lines if not any(text in line for text in ["\0", "<|", *CONTROL])]
    tokenizer = Tokenizer(models.BPE())
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=700, limit_alphabet=160, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merged = [text for text, _ in by_id if len(text) > 1]
    runs = [SPACE * count for count in (2, 3, 4, 8) if SPACE * count not in merged]
    return merged + runs + [text for text, _ in by_id if len(text) == 1]


def scored_metadata(pieces: list[str]) -> dict[str, Any]:
    """GGUF metadata of the vocabulary; earlier pieces score higher, as in Llama's."""
    tokens = CONTROL + BYTES + pieces + OWN
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [0.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }
