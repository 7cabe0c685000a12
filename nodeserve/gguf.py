"""Reads GGUF files: metadata and the table of tensors. Knows nothing of models or arithmetic.

The file is mapped, not read. String arrays (vocabularies of 100,000 tokens) are stepped over and
decoded when somebody asks. Nothing in a file is believed: every count and length is checked
against the bytes that are there and against what any model has, so a truncated or hostile file is a
ModelError, soon, however large it is. Tensors lie within the file, where the alignment allows, and
none over another.

Tensor bytes are mapped private and writable although nobody writes: torch warns about read-only
memory, and MAP_NORESERVE keeps the kernel from counting the file as memory that we may need.
"""

import mmap
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from nodeserve.errors import ModelError
from nodeserve.model_files import open_regular
from nodeserve.types import shown

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 4
_MAX_TENSORS = 1 << 16
_MAX_VALUES = 1 << 16
_MAX_ENTRIES = 1 << 23  # of all arrays together; a vocabulary and its merges are some 800,000
_MAX_KEY_BYTES = (1 << 16) - 1  # as the format has it
_MAX_NAME_BYTES = 256  # of tensors; ggml itself takes 64
_MAX_TEXT_BYTES = 64 << 20  # some files hold a whole tokenizer.json
_MAX_ALIGNMENT = 1 << 20
_MAX_FLOATS = 1 << 16  # of a tensor that is read here
_MAP_NORESERVE = 0x4000  # Linux; the mmap module names it from Python 3.13 on

_UINT32, _STRING, _ARRAY = 4, 8, 9
_SCALARS = {  # value type in the file: format
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?",
    10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_u32 = struct.Struct("<I").unpack_from
_u64 = struct.Struct("<Q").unpack_from


@dataclass(frozen=True, slots=True)
class TensorType:
    """How numbers are packed: blocks of `block_size` values take `block_bytes` bytes."""

    name: str
    block_size: int
    block_bytes: int


TENSOR_TYPES = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    9: TensorType("Q8_1", 32, 40),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    15: TensorType("Q8_K", 256, 292),
    16: TensorType("IQ2_XXS", 256, 66),
    17: TensorType("IQ2_XS", 256, 74),
    18: TensorType("IQ3_XXS", 256, 98),
    19: TensorType("IQ1_S", 256, 50),
    20: TensorType("IQ4_NL", 32, 18),
    21: TensorType("IQ3_S", 256, 110),
    22: TensorType("IQ2_S", 256, 82),
    23: TensorType("IQ4_XS", 256, 136),
    24: TensorType("I8", 1, 1),
    25: TensorType("I16", 1, 2),
    26: TensorType("I32", 1, 4),
    27: TensorType("I64", 1, 8),
    28: TensorType("F64", 1, 8),
    29: TensorType("IQ1_M", 256, 56),
    30: TensorType("BF16", 1, 2),
    34: TensorType("TQ1_0", 256, 54),
    35: TensorType("TQ2_0", 256, 66),
    39: TensorType("MXFP4", 32, 17),
    40: TensorType("NVFP4", 64, 36),
    41: TensorType("Q1_0", 128, 18),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One row of the tensor table; `shape` is outermost first, `offset` counts from byte 0."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int
    num_bytes: int


class StringArray(Sequence[str]):
    """An array of strings in the file, decoded at the first look."""

    def __init__(self, data: mmap.mmap, start: int, count: int) -> None:
        self._data = data
        self._start = start
        self._count = count
        self._strings: list[str] | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # int or slice, as in a list
        return self.strings()[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self.strings())

    def strings(self) -> list[str]:
        if self._strings is None:
            self._strings = self._decode()
        return self._strings

    def _decode(self) -> list[str]:
        data, position = self._data, self._start
        strings = []
        for _ in range(self._count):
            start = position + 8
            position = start + _u64(data, position)[0]
            strings.append(data[start:position].decode("utf-8", "replace"))
        return strings


Value = bool | int | float | str | StringArray | array  # type: ignore[type-arg]


class _Cursor:
    """A position in the mapped file; each `take` moves past what it returns."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0
        self.size = len(data)
        self.entries_left = _MAX_ENTRIES

    def skip(self, num_bytes: int) -> int:
        """Move past `num_bytes` that must be there; the position before."""
        start = self.position
        if num_bytes > self.size - start:
            raise ModelError(f"{num_bytes} bytes announced at byte {start}, file ends before")
        self.position = start + num_bytes
        return start

    def u32(self) -> int:
        value: int = _u32(self.data, self.skip(4))[0]
        return value

    def u64(self) -> int:
        value: int = _u64(self.data, self.skip(8))[0]
        return value

    def count(self, min_bytes: int, most: int) -> int:
        """A count of things that take at least `min_bytes` each."""
        count = self.u64()
        if count * min_bytes > self.size - self.position:
            raise ModelError(f"{count} entries announced at byte {self.position}, file too short")
        if count > most:
            raise ModelError(f"{count} entries announced at byte {self.position}, at most {most}")
        return count

    def string(self, most: int = _MAX_TEXT_BYTES) -> str:
        num_bytes = self.u64()
        start = self.skip(num_bytes)
        if num_bytes > most:
            raise ModelError(f"a text of {num_bytes} bytes at byte {start}, at most {most}")
        return self.data[start : start + num_bytes].decode("utf-8", "replace")

    def value(self) -> Value:
        kind = self.u32()
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        layout = self._scalar(kind)
        value: bool | int | float = struct.unpack_from(
            layout, self.data, self.skip(struct.calcsize(layout))
        )[0]
        return value

    def _scalar(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ModelError(f"value type {kind} at byte {self.position - 4} is unknown")
        return _SCALARS[kind]

    def _array(self) -> Value:
        kind = self.u32()
        if kind == _STRING:
            return self._string_array()
        if kind == _ARRAY:
            raise ModelError(f"an array of arrays at byte {self.position - 4} is not supported")
        code = self._scalar(kind)[1:].replace("?", "B")
        values = array(code)
        count = self._entries(values.itemsize)
        start = self.skip(count * values.itemsize)
        values.frombytes(self.data[start : self.position])
        return values

    def _entries(self, min_bytes: int) -> int:
        count = self.count(min_bytes, self.entries_left)
        self.entries_left -= count
        return count

    def _string_array(self) -> StringArray:
        count = self._entries(8)
        data, start = self.data, self.position
        position = start
        try:
            for _ in range(count):
                position += 8 + _u64(data, position)[0]
        except (struct.error, OverflowError):
            raise ModelError(f"a string in the array at byte {start} has no end") from None
        self.skip(position - start)
        return StringArray(data, start, count)


class GgufFile:
    """A mapped GGUF file: `metadata`, `tensors` and, by `data`, the bytes behind both."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.data = _map(self.path)
        try:
            self._parse(_Cursor(self.data))
        except ModelError as error:
            raise ModelError(f"{self.path} is not a usable GGUF file: {error}") from None

    def _parse(self, cursor: _Cursor) -> None:
        self.version = _check_head(cursor)
        num_tensors = cursor.count(1, _MAX_TENSORS)
        num_values = cursor.count(1, _MAX_VALUES)
        self.metadata: dict[str, Value] = {}
        for _ in range(num_values):
            key = cursor.string(_MAX_KEY_BYTES)
            if key in self.metadata:
                raise ModelError(f"metadata key {shown(key)} appears twice")
            self.metadata[key] = cursor.value()
        _refuse_split(self.metadata)
        rows = [_tensor_row(cursor) for _ in range(num_tensors)]
        alignment = _alignment(self.metadata.get("general.alignment", 32))
        start = (cursor.position + alignment - 1) // alignment * alignment
        self.tensors = {row.name: _placed(row, start, alignment) for row in rows}
        if len(self.tensors) != num_tensors:
            raise ModelError("two tensors have the same name")
        _check_places(sorted(self.tensors.values(), key=lambda one: one.offset), cursor.size)

    def read_floats(self, name: str) -> tuple[float, ...]:
        """The values of a small F32 tensor, without torch."""
        tensor = self.tensors[name]
        if tensor.type.name != "F32":
            raise ModelError(f"{self.path}: {name} is {tensor.type.name}, expected F32")
        count = prod(tensor.shape)
        if count > _MAX_FLOATS:
            raise ModelError(f"{self.path}: {name} has {count} values, at most {_MAX_FLOATS}")
        return struct.unpack_from(f"<{count}f", self.data, tensor.offset)


def _map(path: Path) -> mmap.mmap:
    with open_regular(path) as file:
        try:
            flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
            return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ModelError(f"cannot read {path}: {error}") from None


def _check_head(cursor: _Cursor) -> int:
    start = cursor.skip(4)
    if cursor.data[start : start + 4] != _MAGIC:
        raise ModelError("it does not begin with GGUF")
    version = cursor.u32()
    if version & 0xFFFF == 0:
        raise ModelError("it is big-endian: convert it to little-endian")
    if version not in _VERSIONS:
        raise ModelError(f"version {version} is not supported, only 2 and 3")
    return version


def _refuse_split(metadata: dict[str, Value]) -> None:
    count = metadata.get("split.count", 1)
    if isinstance(count, int) and count > 1:
        raise ModelError(
            f"it is one of {count} parts: join them first with "
            "`llama-gguf-split --merge FIRST_PART OUTPUT`"
        )


def _tensor_row(cursor: _Cursor) -> TensorInfo:
    """One entry of the table; its offset still counts from the start of the tensor data."""
    name = cursor.string(_MAX_NAME_BYTES)
    num_dims = cursor.u32()
    if not 1 <= num_dims <= _MAX_DIMS:
        raise ModelError(f"tensor {name!r} has {num_dims} dimensions")
    shape = tuple(reversed([cursor.u64() for _ in range(num_dims)]))
    if 0 in shape:
        raise ModelError(f"tensor {name!r} of shape {shape} has no values")
    type_id = cursor.u32()
    offset = cursor.u64()
    if type_id not in TENSOR_TYPES:
        raise ModelError(f"tensor {name!r} has the unknown type {type_id}")
    kind = TENSOR_TYPES[type_id]
    if shape[-1] % kind.block_size:
        raise ModelError(f"tensor {name!r}: rows of {shape[-1]} do not fit {kind.name} blocks")
    return TensorInfo(name, shape, kind, offset, prod(shape) // kind.block_size * kind.block_bytes)


def _alignment(value: Value) -> int:
    good = type(value) is int and 8 <= value <= _MAX_ALIGNMENT and not value & (value - 1)
    if not good or not isinstance(value, int):
        raise ModelError(
            f"general.alignment is {shown(value)}, must be a power of two from 8 to"
            f" {_MAX_ALIGNMENT}"
        )
    return value


def _placed(row: TensorInfo, start: int, alignment: int) -> TensorInfo:
    if row.offset % alignment:
        raise ModelError(
            f"tensor {row.name!r} begins at {row.offset}, no multiple of the alignment {alignment}"
        )
    return replace(row, offset=start + row.offset)


def _check_places(tensors: list[TensorInfo], num_bytes: int) -> None:
    """Of tensors in the order of their places: within the file, none over another."""
    end, before = 0, ""
    for tensor in tensors:
        if tensor.offset < end:
            raise ModelError(f"tensors {before!r} and {tensor.name!r} overlap")
        end, before = tensor.offset + tensor.num_bytes, tensor.name
        if end > num_bytes:
            raise ModelError(f"the file ends before tensor {tensor.name!r} does: truncated?")
