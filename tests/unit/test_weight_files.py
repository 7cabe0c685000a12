"""Safetensors files that are missing, cut short or something else are found before any is read."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from nodeserve.errors import ModelError
from nodeserve.weight_files import INDEX, MAX_HEADER_BYTES, check_weight_files

TENSORS: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "F32", "shape": [3], "data_offsets": [8, 20]},
}


def file_of(header: Any, num_data_bytes: int = 20) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(num_data_bytes)


def test_whole_files_pass_with_and_without_an_index(tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").write_bytes(file_of(TENSORS))
    check_weight_files(tmp_path)
    (tmp_path / "two.safetensors").write_bytes(file_of({}, 0))
    (tmp_path / "unused.safetensors").write_bytes(b"")
    names = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": names}))
    check_weight_files(tmp_path)


BAD = {
    "cut short": (file_of(TENSORS)[:-1], "should have .* cut short"),
    "too long": (file_of(TENSORS) + b"x", "should have"),
    "cut in its header": (file_of(TENSORS)[:40], "header cannot be read"),
    "empty": (b"", "has 0 bytes"),
    "something else": (b"<!DOCTYPE html><html>", "its header would have"),
    "a large header": (struct.pack("<Q", MAX_HEADER_BYTES + 1), "its header would have"),
    "no JSON": (file_of(b"{nothing}"), "header cannot be read"),
    "no object": (file_of([1]), "header cannot be read"),
    "nested": (file_of(b"[" * 100_000), "header cannot be read"),
    "no offsets": (file_of({"a": {"dtype": "F32"}}), "header cannot be read"),
    "odd offsets": (file_of({"a": {"data_offsets": [0, "9"]}}), "header cannot be read"),
    "odd entry": (file_of({"a": 7}), "header cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_none_is_named(tmp_path: Path, name: str) -> None:
    data, words = BAD[name]
    (tmp_path / "one.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=f"one.safetensors .*{words}"):
        check_weight_files(tmp_path)


def test_a_file_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").write_bytes(file_of(TENSORS))
    names = {"a": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError, match="cannot read .*two.safetensors.*No such file"):
        check_weight_files(tmp_path)
    for odd in (3, {"a": 3}, {"a": "../one.safetensors"}, {"a": "one.bin"}):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": odd}))
        with pytest.raises(ModelError, match="weight_map must map"):
            check_weight_files(tmp_path)
