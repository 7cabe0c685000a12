"""Token ids and text against llama.cpp (stored), transformers and tokenizers (run)."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Encoder
from tokenizers import decoders, models, pre_tokenizers, trainers

from nodeserve.checkpoint import resolve
from nodeserve.text import Detokenizer, Tokenizer, gguf_vocabulary
from tests.fakes.gguf_writer import write_gguf
from tests.reference.awkward import awkward_strings
from tests.reference.embedded import needs_embedded_model
from tests.reference.export import export_tokenizer
from tests.reference.sentencepiece import scored_metadata, train_pieces

DATA = Path(__file__).parent / "data"
SMOLLM2 = json.loads((DATA / "tokenizer_smollm2.json").read_text())
SENTENCEPIECE = json.loads((DATA / "tokenizer_sentencepiece.json").read_text())
MISSING = {*b"\x04\x06\x13\x14\x16\x1d\xf1\xf2"}  # no tokens of SmolLM2's: everyone drops them
MESSAGES = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "2 <|im_end|> ½"},
    {"role": "user", "content": "Why?\n"},
]


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return Tokenizer.load(resolve().path)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("sentencepiece") / "m.gguf"
    return Tokenizer.load(write_gguf(path, scored_metadata(SENTENCEPIECE["pieces"])))


def check_ids(tokenizer: Tokenizer, rows: list[dict[str, Any]]) -> None:
    texts = [row["text"] for row in rows]
    assert texts == awkward_strings(), "run tests.reference.make_tokenizer_data again"
    for row in rows:
        assert tokenizer.encode(row["text"]) == row["ids"], row["text"]
        assert tokenizer.encode(row["text"], parse_special=False) == row["plain_ids"], row["text"]


@needs_embedded_model
def test_embedded_model_tokenises_as_llama_cpp(smollm2: Tokenizer) -> None:
    check_ids(smollm2, SMOLLM2["rows"])


def test_sentencepiece_tokenises_as_llama_cpp(sentencepiece: Tokenizer) -> None:
    check_ids(sentencepiece, SENTENCEPIECE["rows"])


@needs_embedded_model
@pytest.mark.parametrize("name", ["smollm2", "sentencepiece"])
def test_text_survives_encoding_and_streams_whole(
    name: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    for text in awkward_strings():
        if name == "smollm2" and MISSING & set(text.encode()):
            continue
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        assert tokenizer.decode(ids) == text
        stream = Detokenizer(tokenizer)
        parts = [stream.push([token_id]) for token_id in ids]
        assert "".join(parts) == text and stream.finish() == ""
        assert all("\ufffd" in text or "\ufffd" not in part for part in parts)


@needs_embedded_model
@pytest.mark.parametrize("seed", range(3))
def test_random_ids_decode_as_tokenizers_does_and_stream_whole(
    smollm2: Tokenizer, seed: int
) -> None:
    rng = random.Random(seed)
    encoder = gguf_vocabulary.read(resolve().path).encoder
    for _ in range(100):
        ids = rng.choices(range(smollm2.vocab_size), k=40)
        for skip_special in (True, False):
            whole = smollm2.decode(ids, skip_special)
            assert whole == encoder.decode(ids, skip_special_tokens=skip_special)
            stream = Detokenizer(smollm2, skip_special=skip_special)
            parts = [stream.push(ids[i : i + 3]) for i in range(0, len(ids), 3)]
            assert "".join(parts) + stream.finish() == whole


@needs_embedded_model
def test_folder_and_chat_template_against_transformers(tmp_path: Path, smollm2: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    export_tokenizer(gguf_vocabulary.read(resolve().path), tmp_path)
    ours = Tokenizer.load(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for row in SMOLLM2["rows"]:
        assert ours.encode(row["text"]) == theirs.encode(row["text"]) == row["ids"]
        assert ours.decode(row["ids"]) == theirs.decode(row["ids"], skip_special_tokens=True)
    for add_generation_prompt in (True, False):
        expected = theirs.apply_chat_template(
            MESSAGES, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert ours.chat_prompt(MESSAGES, add_generation_prompt) == expected
        assert smollm2.chat_prompt(MESSAGES, add_generation_prompt) == expected


def test_sentencepiece_folder_against_transformers(tmp_path: Path) -> None:
    """transformers builds Llama 2's tokenizer from pieces in its own way."""
    transformers = pytest.importorskip("transformers")
    metadata = scored_metadata(SENTENCEPIECE["pieces"])
    vocabulary = gguf_vocabulary.read(write_gguf(tmp_path / "m.gguf", metadata))
    export_tokenizer(vocabulary, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    for row in SENTENCEPIECE["rows"]:
        assert ours.encode(row["text"]) == theirs.encode(row["text"]) == row["ids"]
        if "\ufffd" not in row["text"]:
            assert ours.decode(row["ids"]) == theirs.decode(row["ids"], skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_trained_folders_against_tokenizers(tmp_path: Path, kind: str) -> None:
    encoder = Encoder(models.BPE(byte_fallback=kind == "metaspace", unk_token="<unk>"))
    initial: list[str] = ["<unk>", "<s>"]
    if kind == "byte_level":
        encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        encoder.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        encoder.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        encoder.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        alphabet = []
        initial += [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=initial[:2], initial_alphabet=alphabet, show_progress=False
    )
    encoder.train_from_iterator(awkward_strings(), trainer)
    encoder.add_tokens(["<own>"])
    encoder.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    for text in [*awkward_strings(), "x<own> y"]:
        ids = tokenizer.encode(text)
        assert ids == encoder.encode(text).ids
        assert tokenizer.decode(ids) == encoder.decode(ids)


def test_training_is_repeatable() -> None:
    """The stored pieces are what the script makes, if nobody changed its inputs."""
    lines = Path("LICENSE").read_text().splitlines() + awkward_strings()
    assert len(train_pieces(lines)) == len(SENTENCEPIECE["pieces"])
