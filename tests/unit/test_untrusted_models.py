"""Models from somebody else: whatever is in their files, a ModelError, soon and in a few words."""

import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from nodeserve import gguf, model_files
from nodeserve.checkpoint import resolve
from nodeserve.config_readers import folder_config
from nodeserve.config_readers.gguf import gguf_config
from nodeserve.errors import ModelError
from nodeserve.gguf import GgufFile
from nodeserve.model_files import read_json, read_text
from nodeserve.text import Tokenizer, gguf_vocabulary
from tests.fakes.gguf_writer import (
    gguf_bytes,
    gpt2_metadata,
    sentencepiece_metadata,
    string,
    write_gguf,
)
from tests.unit.test_checkpoint import EMBEDDING, SHAPE, folder

# -- text files ---------------------------------------------------------------------------------


def unreadable(path: Path, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        read_json(path)
    assert len(str(caught.value)) < 500 + len(str(path))


def test_json_is_bounded_in_depth_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    for text in ("[" * 200_000, '{"a":' * 200_000):
        path.write_text(text)
        unreadable(path, "nested too deeply")
    path.write_text(json.dumps({"a": 10**4299}))
    assert read_json(path) == {"a": 10**4299}
    path.write_text('{"a": ' + "1" * 5000 + "}")
    unreadable(path, "cannot read .*digits")
    monkeypatch.setattr(model_files, "MAX_JSON_BYTES", 100)
    path.write_text('"' + "x" * 100)
    unreadable(path, "more than 100 bytes")
    path.write_bytes(b'"\xff"')
    unreadable(path, "cannot read .*utf-8")


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.touch()
    os.truncate(path, 1 << 40)  # a hole
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match="more than 1048576 bytes"):
            read_text(path, 1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "m.gguf"])
def test_only_regular_files_are_opened(tmp_path: Path, name: str) -> None:
    """Opening a pipe waited for somebody to write to it."""
    path = tmp_path / name
    os.mkfifo(path)
    read: Any = GgufFile if name == "m.gguf" else read_json
    with pytest.raises(ModelError, match="not a regular file"):
        read(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ModelError, match="cannot read"):
        read(path)
    with pytest.raises(ModelError, match="cannot read"):
        read(tmp_path / "a\0b")


def test_a_link_may_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"a": "secret"}')
    inside = tmp_path / "model"
    inside.mkdir()
    (inside / "config.json").symlink_to(secret)
    unreadable(inside / "config.json", "a link that leaves the model's folder")
    (inside / "link").symlink_to("config.json")
    unreadable(inside / "link", "a link that leaves the model's folder")
    (inside / "config.json").unlink()
    (inside / "config.json").write_text("{}")
    assert read_json(inside / "link") == {}
    (tmp_path / "other name").symlink_to(inside)  # where the folder is is the user's own choice
    assert read_json(tmp_path / "other name" / "config.json") == {}


def test_a_template_cannot_be_another_file(tmp_path: Path) -> None:
    secret = tmp_path / "id_key"
    secret.write_text("secret")
    path = folder(tmp_path / "model")
    source = Tokenizer.load(write_gguf(tmp_path / "m.gguf", gpt2_metadata()))
    (path / "tokenizer.json").write_text(source._encoder.to_str())
    (path / "chat_template.jinja").symlink_to(secret)
    with pytest.raises(ModelError, match="leaves the model's folder"):
        Tokenizer.load(path)


def test_the_links_of_the_hubs_cache_are_known(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--some--model" / "blobs"
    blobs.mkdir()
    (blobs / "0123").write_text('{"a": 1}')
    (snapshot / "config.json").symlink_to("../../blobs/0123")
    assert read_json(snapshot / "config.json") == {"a": 1}
    (tmp_path / "elsewhere").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../../elsewhere")
    unreadable(snapshot / "tokenizer.json", "leaves the model's folder")


# -- tokenizer.json -----------------------------------------------------------------------------


def damaged_tokenizer(path: Path, **changes: Any) -> Path:
    source = Tokenizer.load(write_gguf(path / "m.gguf", gpt2_metadata()))
    state = json.loads(source._encoder.to_str())
    (path / "tokenizer.json").write_text(json.dumps({**state, **changes}))
    return path


def test_a_text_that_a_tokenizer_cannot_take_is_a_model_error(tmp_path: Path) -> None:
    """The package only notices when it needs the token, and raises a plain Exception."""
    model = {"type": "BPE", "vocab": {"h": 0}, "merges": [], "unk_token": "missing"}
    tokenizer = Tokenizer.load(damaged_tokenizer(tmp_path, model=model))
    with pytest.raises(ModelError, match="cannot encode this text: .*`missing` not found"):
        tokenizer.encode("hello")


def test_what_a_library_says_of_a_file_is_cut(tmp_path: Path) -> None:
    """It may be the file."""
    for changes in (
        {"model": {"type": "x" * 100_000}},
        {"x" * 100_000: 1},
        {"version": "x" * 9999},
    ):
        with pytest.raises(ModelError, match="is not a tokenizer") as caught:
            Tokenizer.load(damaged_tokenizer(tmp_path, **changes))
        assert len(str(caught.value)) < 500 + len(str(tmp_path))


# -- config.json --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 10**400},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": float("inf")},
        {"rope_theta": -(10**400)},
        {"hidden_size": 2**24 + 1},
        {"hidden_size": 10**400},
        {"num_hidden_layers": 4097},
        {"max_position_embeddings": 2**31},
        {"num_attention_heads": 2**23},
        {"eos_token_id": 2**31},
        {"eos_token_id": [5, -1]},
        {"eos_token_id": [True]},
        {"eos_token_id": list(range(1025))},
        {"bos_token_id": 10**30},
        {"model_type": ["x" * 1_000_000]},
        {"model_type": {"a": [1] * 1_000_000}},
        {"hidden_size": "x" * 1_000_000},
        {"hidden_act": "x" * 1_000_000},
        {"rope_scaling": {"rope_type": "x" * 1_000_000}},
        {"quantization_config": {"quant_method": "x" * 1_000_000}},
    ],
    ids=lambda changes: f"{changes}"[:40],
)
def test_absurd_values_are_named_in_a_few_words(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as caught:
        folder_config(folder(tmp_path, **changes))
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


# -- pickles ------------------------------------------------------------------------------------


def test_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    path = folder(tmp_path / "model")
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    for name in (path, path / "pytorch_model.bin"):
        with pytest.raises(ModelError, match=r"pytorch_model.bin is pickled.*\*.safetensors"):
            resolve(str(name))


# -- GGUF ---------------------------------------------------------------------------------------


def refused(path: Path, data: bytes, words: str) -> None:
    path.write_bytes(data)
    with pytest.raises(ModelError, match=words) as caught:
        GgufFile(path)
    assert len(str(caught.value)) < 1000 + len(str(path))


def head(num_tensors: int, num_values: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_values) + rest


def row(name: str, offset: int, *dims: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, offset)


def tensors(*rows: bytes, num_bytes: int = 256) -> bytes:
    table = head(len(rows), 0, b"".join(rows))
    return table + bytes(-len(table) % 32 + num_bytes)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (tensors(row("a", 0, 16), row("b", 32, 16)), "'a' and 'b' overlap"),
        (tensors(row("b", 32, 16), row("a", 0, 16)), "'a' and 'b' overlap"),
        (tensors(row("a", 0, 16), row("b", 0, 16)), "overlap"),
        (tensors(row("a", 4, 16)), "no multiple of the alignment"),
        (tensors(row("a", 0, 0)), "has no values"),
        (tensors(row("a", 0, 2**62, 0)), "has no values"),
        (tensors(row("a", 0, 2**63, 2**63, 2**63, 2**63)), "truncated"),
        (tensors(row("a", 2**64 - 32, 8)), "truncated"),
        (tensors(row("a" * 257, 0, 8)), "a text of 257 bytes"),
        (head(0, 1, string("k" * 70_000) + struct.pack("<IB", 0, 1)), "a text of 70000 bytes"),
        (head(2**17, 0, bytes(2**18)), "131072 entries announced.*at most 65536"),
        (head(0, 2**17, bytes(2**18)), "131072 entries announced.*at most 65536"),
        (gguf_bytes({"general.alignment": 4}), "power of two from 8 to"),
        (gguf_bytes({"general.alignment": 2**30}), "power of two from 8 to"),
        (gguf_bytes({"general.alignment": True}), "power of two from 8 to"),
        (gguf_bytes({"general.alignment": "x" * 100_000}), "power of two from 8 to"),
    ],
)
def test_tables_that_cannot_be(tmp_path: Path, data: bytes, words: str) -> None:
    refused(tmp_path / "m.gguf", data, words)


def test_tensors_side_by_side_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tensors(row("b", 64, 16), row("a", 0, 16)))
    assert set(GgufFile(path).tensors) == {"a", "b"}


def test_a_huge_sparse_file_of_empty_strings_is_refused_at_once(tmp_path: Path) -> None:
    """2^37 strings of no bytes fit a file of 2^40 that takes no room on the disk."""
    path = tmp_path / "m.gguf"
    path.write_bytes(head(0, 1, string("k") + struct.pack("<IIQ", 9, 8, 2**36)))
    os.truncate(path, 2**40)
    with pytest.raises(ModelError, match="entries announced.*at most 8388608"):
        GgufFile(path)
    path.write_bytes(head(0, 1, string("k") + struct.pack("<IQ", 8, 2**39)))
    os.truncate(path, 2**40)
    with pytest.raises(ModelError, match="a text of 549755813888 bytes"):
        GgufFile(path)


def test_the_entries_of_all_arrays_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "_MAX_ENTRIES", 5)
    assert GgufFile(write_gguf(tmp_path / "m.gguf", {"a": [1, 2, 3], "b": ["x", "y"]})).metadata
    refused(tmp_path / "m.gguf", gguf_bytes({"a": [1, 2, 3], "b": ["x", "y", "z"]}), "at most 2")


def test_a_large_tensor_is_not_read_as_a_small_one(tmp_path: Path) -> None:
    count = (1 << 16) + 1
    values = {"rope_freqs.weight": ((count,), 0, bytes(4 * count))}
    write_gguf(tmp_path / "m.gguf", {**gpt2_metadata(), **SHAPE}, {**EMBEDDING, **values})
    with pytest.raises(ModelError, match="65537 values, at most 65536"):
        gguf_config(GgufFile(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer.ggml.token_type": 3},
        {"tokenizer.ggml.token_type": "control"},
        {"tokenizer.ggml.token_type": ["3"] * 264},
        {"tokenizer.ggml.tokens": [1, 2, 3]},
    ],
)
def test_token_types_of_another_type_are_ignored_for_the_shape(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """A number where a list should be ended the start with a TypeError."""
    metadata = {**gpt2_metadata(), **SHAPE, **changes}
    write_gguf(tmp_path / "m.gguf", metadata, EMBEDDING)
    assert gguf_config(GgufFile(tmp_path / "m.gguf")).eos_token_ids == (262,)
    with pytest.raises(ModelError):
        gguf_vocabulary.read(tmp_path / "m.gguf")


@pytest.mark.parametrize("metadata", [gpt2_metadata, sentencepiece_metadata])
def test_tokens_and_templates_are_bounded(tmp_path: Path, metadata: Any) -> None:
    """The ways to cut a SentencePiece token in two are as many as its characters, and each is a
    copy."""
    whole = metadata()
    tokens = whole["tokenizer.ggml.tokens"]
    write_gguf(tmp_path / "m.gguf", {**whole, "tokenizer.ggml.tokens": [*tokens[:-1], "x" * 5000]})
    with pytest.raises(ModelError, match="tokens of up to 5000 characters"):
        gguf_vocabulary.read(tmp_path / "m.gguf")
    long = {"tokenizer.chat_template": "x" * 1_100_000}
    write_gguf(tmp_path / "m.gguf", {**whole, **long})
    with pytest.raises(ModelError, match="a chat template of 1100000 characters"):
        gguf_vocabulary.read(tmp_path / "m.gguf")
