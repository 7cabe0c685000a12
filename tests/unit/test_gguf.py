import random
import struct
from pathlib import Path

import pytest

from nodeserve.errors import ModelError
from nodeserve.gguf import GgufFile, StringArray
from tests.fakes.gguf_writer import gguf_bytes, string, write_gguf

METADATA = {
    "general.architecture": "llama",
    "a.flag": True,
    "a.count": 7,
    "a.number": 0.5,
    "a.names": ["eins", "", "δύο", "🙂"],
    "a.types": [1, -2, 3],
    "a.scores": [0.25, -1.0],
}
FLOATS = struct.pack("<6f", *range(6))
TENSORS = {
    "first": ((2, 3), 0, FLOATS),
    "packed": ((2, 32), 8, bytes(range(68))),
}


def refused(path: Path, data: bytes, message: str) -> None:
    path.write_bytes(data)
    with pytest.raises(ModelError, match=message):
        GgufFile(path)


@pytest.mark.parametrize("version", [2, 3])
def test_reads_metadata_and_tensors(tmp_path: Path, version: int) -> None:
    file = GgufFile(write_gguf(tmp_path / "m.gguf", METADATA, TENSORS, version=version))
    assert file.version == version
    plain = {
        k: list(v) if hasattr(v, "__iter__") and not isinstance(v, str) else v
        for k, v in file.metadata.items()
    }
    assert plain == METADATA and plain["a.flag"] is True
    first, packed = file.tensors["first"], file.tensors["packed"]
    assert (first.shape, first.type.name, first.num_bytes) == ((2, 3), "F32", 24)
    assert (packed.shape, packed.type.name, packed.num_bytes) == ((2, 32), "Q8_0", 68)
    assert file.read_floats("first") == tuple(range(6))
    assert file.data[packed.offset : packed.offset + 68] == bytes(range(68))


def test_string_arrays_are_sequences_and_broken_text_is_replaced(tmp_path: Path) -> None:
    data = gguf_bytes({"names": ["aaa", "b"]}).replace(b"aaa", b"a\xffa")
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    names = GgufFile(path).metadata["names"]
    assert isinstance(names, StringArray)
    assert len(names) == 2 and names[0] == "a\ufffda" and names[-1] == "b"


def test_what_is_no_gguf_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(ModelError, match="cannot read"):
        GgufFile(path)
    with pytest.raises(ModelError, match="cannot read"):
        GgufFile(tmp_path)
    refused(path, b"", "cannot read")
    refused(path, b"GGU", "file ends before")
    refused(path, b"PK\3\4" + b"\0" * 40, "does not begin with GGUF")
    refused(path, gguf_bytes({}, version=1), "version 1 is not supported")
    refused(path, b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian")


def test_split_files_say_how_to_join_them(tmp_path: Path) -> None:
    refused(tmp_path / "m.gguf", gguf_bytes({"split.count": 3}), "one of 3 parts.*--merge")
    assert GgufFile(write_gguf(tmp_path / "one.gguf", {"split.count": 1})).tensors == {}


def head(num_tensors: int, num_values: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_values) + rest


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (head(2**63, 0), "entries announced"),
        (head(0, 2**63), "entries announced"),
        (head(0, 1, struct.pack("<Q", 2**64 - 1) + b"key"), "bytes announced"),
        (head(0, 1, string("k") + struct.pack("<I", 99)), "value type 99"),
        (head(0, 1, string("k") + struct.pack("<IIQ", 9, 8, 2**62)), "entries announced"),
        (head(0, 1, string("k") + struct.pack("<IIQQ", 9, 8, 1, 2**63)), "has no end|bytes ann"),
        (head(0, 1, string("k") + struct.pack("<IIQQQ", 9, 8, 2, 2**63, 2**63)), "has no end"),
        (head(0, 1, string("k") + struct.pack("<IIQ", 9, 4, 2**62)), "entries announced"),
        (head(0, 1, string("k") + struct.pack("<IIQ", 9, 9, 1)), "array of arrays"),
        (head(0, 2, 2 * (string("k") + struct.pack("<IB", 0, 1))), "appears twice"),
        (head(1, 0, string("t") + struct.pack("<I", 5)), "5 dimensions"),
        (head(1, 0, string("t") + struct.pack("<I", 0)), "0 dimensions"),
        (head(1, 0, string("t") + struct.pack("<IQIQ", 1, 8, 4, 0)), "unknown type 4"),
        (head(1, 0, string("t") + struct.pack("<IQIQ", 1, 31, 8, 0)), "do not fit Q8_0"),
        (head(1, 0, string("t") + struct.pack("<IQIQ", 1, 2**62, 0, 0)), "truncated"),
        (head(1, 0, string("t") + struct.pack("<IQIQ", 1, 8, 0, 2**63)), "truncated"),
        (gguf_bytes({"general.alignment": 3}), "power of two"),
        (gguf_bytes({"general.alignment": "x"}), "power of two"),
    ],
)
def test_lies_about_sizes_are_model_errors(tmp_path: Path, data: bytes, message: str) -> None:
    refused(tmp_path / "m.gguf", data, message)


def test_every_truncation_is_a_model_error(tmp_path: Path) -> None:
    whole = gguf_bytes(METADATA, TENSORS)
    path = tmp_path / "m.gguf"
    for size in range(len(whole) - 28):  # the padding after the last tensor may be missing
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError):
            GgufFile(path)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_parse_or_are_model_errors(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    whole = gguf_bytes(METADATA, TENSORS)
    path = tmp_path / "m.gguf"
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(whole) - 100)] = rng.choice(
                [0, 1, 127, 255, rng.randrange(256)]
            )
        path.write_bytes(damaged)
        try:
            file = GgufFile(path)
        except ModelError:
            continue
        assert all(t.offset + t.num_bytes <= len(whole) for t in file.tensors.values())
        for value in file.metadata.values():
            assert not isinstance(value, StringArray) or len(value.strings()) == len(value)
