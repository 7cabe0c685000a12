"""Whether a model's safetensors files are there and whole, by their headers alone.

GGUF files need none of this: reading their metadata checks every tensor against the file's end.
"""

import json
import struct
from pathlib import Path
from typing import Any

from nodeserve.errors import ModelError
from nodeserve.model_files import open_regular, read_json

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # as the format's own library has it
_LENGTH = struct.Struct("<Q")


def check_weight_files(folder: Path) -> None:
    """ModelError names the first file that is missing, cut short or none at all."""
    for path in weight_files(folder):
        with open_regular(path) as file:
            length = file.read(_LENGTH.size)
            header = file.read(_header_bytes(path, length))
        expected = _LENGTH.size + len(header) + _data_bytes(path, header)
        if (size := path.stat().st_size) != expected:
            raise ModelError(
                f"{path} has {size} bytes and should have {expected}: get it again, the download"
                " was probably cut short"
            )


def weight_files(folder: Path) -> list[Path]:
    """Those that the index names, or else all that are there."""
    index = folder / INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(map(_is_file_name, names.values())):
        raise ModelError(
            f"{index}: weight_map must map tensor names to *.safetensors files in its folder"
        )
    return [folder / name for name in sorted(set(names.values()))]


def _is_file_name(value: object) -> bool:
    if not isinstance(value, str) or "\0" in value:
        return False
    return Path(value).name == value and value.endswith(".safetensors")


def _header_bytes(path: Path, length: bytes) -> int:
    if len(length) < _LENGTH.size:
        raise ModelError(f"{path} is no safetensors file: it has {len(length)} bytes")
    count: int = _LENGTH.unpack(length)[0]
    if count > MAX_HEADER_BYTES:
        raise ModelError(f"{path} is no safetensors file: its header would have {count} bytes")
    return count


def _data_bytes(path: Path, header: bytes) -> int:
    """Where the last tensor ends, from the first one's beginning."""
    try:
        entries = json.loads(header)
        return max((_end(e) for name, e in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise ModelError(f"{path} is no safetensors file: its header cannot be read") from None


def _end(entry: dict[str, Any]) -> int:
    end = entry["data_offsets"][1]
    if type(end) is not int:
        raise TypeError(end)
    return end
