"""Reads a checkpoint's weights by the names that the hub gives them, whatever the file format.

`open_weights(checkpoint, dtype)` reads nothing yet; each `weights(name)` reads one tensor, and
`weights(name, part)` only the rows or columns of it that a tensor rank has. Files
stay mapped, so what is never asked for is never read; workers of one node share the pages that the
system keeps of them. For another device, tensors go there as they are in the file and become
`dtype` there.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from nodeserve.checkpoint import Checkpoint
from nodeserve.config import ModelConfig
from nodeserve.errors import ModelError
from nodeserve.gguf import GgufFile, TensorInfo
from nodeserve.model.dequantise import dequantise
from nodeserve.model.dummy import DummyWeights
from nodeserve.model.families import shape_of
from nodeserve.model.fp8 import from_fp8, num_blocks
from nodeserve.model.part import Part, blocks_within
from nodeserve.model.quantised import Quantised, Weight, can_stay
from nodeserve.model_files import open_regular, read_json
from nodeserve.types import brief

_IN_FLOAT32 = ".e_score_correction_bias"  # experts are chosen by its last digits


class Upload(Protocol):
    """Takes tensors to a device."""

    device: torch.device

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a CPU tensor on the device; the tensor may go when this returns."""


class Source(Protocol):
    """Tensors by hub name, whichever way they come about."""

    def __contains__(self, name: object) -> bool: ...

    def __call__(self, name: str, part: Part | None = None) -> torch.Tensor: ...


class StoredSource(Protocol):
    """The same, where matrices may be as a file quantises them."""

    def __call__(self, name: str, part: Part | None = None) -> Weight: ...


class Weights(ABC):
    """The tensors of one model, in one dtype, by hub name."""

    def __init__(self, where: str, config: ModelConfig, dtype: torch.dtype) -> None:
        self.where = where
        self.dtype = dtype
        self._config = config

    @abstractmethod
    def __contains__(self, name: object) -> bool: ...

    @abstractmethod
    def _shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""

    @abstractmethod
    def _read(self, name: str, part: Part | None) -> torch.Tensor: ...

    def as_stored(self, name: str, part: Part | None = None) -> torch.Tensor:
        """The tensor called `name`, on the CPU, in the file's own type if torch has it."""
        if name not in self:
            raise ModelError(f"{self.where} has no tensor {name}")
        return self._read(name, part)

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Kernels trust the shapes that the configuration gives: a file must have the same."""
        expected = shape_of(self._config, name)
        if expected is not None and shape != expected:
            raise ModelError(f"{self.where}: {name} has the shape {shape}, expected {expected}")

    def restored(
        self, name: str, move: Callable[[torch.Tensor], torch.Tensor], part: Part | None = None
    ) -> torch.Tensor:
        """The tensor called `name` in the model's type, where `move` takes it."""
        stored = self.as_stored(name, part)
        if stored.dtype.itemsize > 1:
            return move(stored).to(torch.float32 if name.endswith(_IN_FLOAT32) else self.dtype)
        whole = self._shape(name)
        block, scales = self._scales_of(name, whole, stored.dtype)
        firsts = [place.start for place in part.within(whole)] if part else [0, 0]
        return from_fp8(move(stored), move(scales), block, self.dtype, *firsts)

    def _scales_of(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[tuple[int, int], torch.Tensor]:
        """The blocks of a whole matrix of 8-bit floats, and their scales."""
        block, of_scales = self._config.fp8_block, f"{name}_scale_inv"
        if dtype != torch.float8_e4m3fn or block is None or of_scales not in self:
            raise ModelError(
                f"{self.where}: {name} is stored as {dtype}; of 8-bit types only"
                f" float8_e4m3fn can be read, with {of_scales} beside it and a"
                " quantization_config in config.json"
            )
        scales, expected = self.as_stored(of_scales), num_blocks(shape, block)
        if (found := tuple(scales.shape)) != expected:
            raise ModelError(
                f"{self.where}: {of_scales} has the shape {found}, expected {expected}"
            )
        return block, scales

    def __call__(self, name: str, part: Part | None = None) -> torch.Tensor:
        """The tensor called `name`, on the CPU."""
        return self.restored(name, lambda tensor: tensor, part)


class Uploaded:
    """A file's tensors on a device; they become the model's type there."""

    def __init__(self, weights: Weights, upload: Upload) -> None:
        self._weights = weights
        self._upload = upload

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __call__(self, name: str, part: Part | None = None) -> torch.Tensor:
        return self._weights.restored(name, self._upload, part)


def open_weights(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    load_format: str = "auto",
    upload: Upload | None = None,
) -> Source:
    """Tensors of `dtype` by hub name, on the CPU or where `upload` puts them.

    Random ones with load_format "dummy", made where they stay.
    """
    if load_format == "dummy":
        device = torch.device("cpu") if upload is None else upload.device
        return DummyWeights(checkpoint.config, dtype, device)
    kind = GgufWeights if checkpoint.kind == "gguf" else SafetensorsWeights
    weights = kind(checkpoint, dtype)
    return weights if upload is None else Uploaded(weights, upload)


def open_stored(
    checkpoint: Checkpoint, dtype: torch.dtype, load_format: str = "auto"
) -> StoredSource:
    """Weights on the CPU by hub name; matrices that a file quantises stay so where they can."""
    weights = open_weights(checkpoint, dtype, load_format)
    return weights.as_quantised if isinstance(weights, GgufWeights) else weights


# -- safetensors --------------------------------------------------------------------------------


class SafetensorsWeights(Weights):
    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        super().__init__(str(checkpoint.path), checkpoint.config, dtype)
        self._files: dict[Path, Any] = {}
        self._places = _places(checkpoint.path, self._open)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(self._places[name]).get_slice(name).get_shape())

    def _read(self, name: str, part: Part | None) -> torch.Tensor:
        """Of a part, reads what it has and no more."""
        try:
            file, shape = self._open(self._places[name]), self._shape(name)
            self._check_shape(name, shape)
            if part is None:
                tensor: torch.Tensor = file.get_tensor(name)
            else:
                tensor = file.get_slice(name)[part.within(shape)]
        except SafetensorError as error:
            raise ModelError(f"{self._places[name]}: cannot read {name}: {brief(error)}") from None
        return tensor

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            open_regular(path).close()
            try:
                self._files[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"cannot read {path}: {brief(error)}") from None
        return self._files[path]


def _places(folder: Path, open_file: Any) -> dict[str, Path]:
    """Tensor name to file: by the index if there is one, else from the only file."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(_is_file_name(n) for n in names.values()):
            raise ModelError(
                f"{index}: weight_map must map tensor names to *.safetensors files in its folder"
            )
        return {name: folder / file for name, file in names.items()}
    path = folder / "model.safetensors"
    if not path.is_file():
        found = sorted(folder.glob("*.safetensors"))
        if len(found) != 1:
            raise ModelError(f"{folder} has {len(found)} *.safetensors files and no {index.name}")
        path = found[0]
    return dict.fromkeys(open_file(path).keys(), path)


def _is_file_name(value: object) -> bool:
    if not isinstance(value, str) or "\0" in value or len(value) > 255:
        return False
    return Path(value).name == value and value.endswith(".safetensors")


# -- GGUF ---------------------------------------------------------------------------------------

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_HUB_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def gguf_name(hub_name: str) -> str:
    """What GGUF calls a tensor of the hub; names without an equivalent stay as they are."""
    stem, _, suffix = hub_name.rpartition(".")
    if match := _HUB_LAYER.fullmatch(stem):
        layer, part = match.groups()
        return f"blk.{layer}.{_GGUF_LAYER_NAMES.get(part, part)}.{suffix}"
    return f"{_GGUF_NAMES.get(stem, stem)}.{suffix}"


class GgufWeights(Weights):
    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        super().__init__(str(checkpoint.path), checkpoint.config, dtype)
        self._file = GgufFile(checkpoint.path)
        self._head_dim = checkpoint.config.head_dim
        # Only there the converter reorders rows.
        self._paired = ("attn_q", "attn_k") if checkpoint.config.architecture == "llama" else ()

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and gguf_name(name) in self._file.tensors

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[gguf_name(name)].shape

    def _read(self, name: str, part: Part | None) -> torch.Tensor:
        tensor = self._file.tensors[gguf_name(name)]
        self._check_shape(name, tensor.shape)
        data = self._bytes_of(tensor)
        if part is not None:
            if (inside := blocks_within(data, tensor, part)) is None:
                whole = self._in_order(dequantise(data, tensor, self.dtype), tensor)
                return whole[part.within(tensor.shape)].clone()
            data, tensor = inside
        return self._in_order(dequantise(data, tensor, self.dtype), tensor)

    def as_quantised(self, name: str, part: Part | None = None) -> Weight:
        """The tensor called `name`, its blocks as they are where that can be."""
        tensor = self._file.tensors.get(gguf_name(name))
        if tensor is None or not can_stay(tensor):
            return self(name, part)
        self._check_shape(name, tensor.shape)
        data = self._bytes_of(tensor)
        if part is not None:
            if (inside := blocks_within(data, tensor, part)) is None:
                return self(name, part)
            data, tensor = inside
        blocks = data.view(tensor.shape[0], -1)
        return Quantised(self._in_order(blocks, tensor), tensor.type, self.dtype)

    def _bytes_of(self, tensor: TensorInfo) -> torch.Tensor:
        return torch.frombuffer(
            self._file.data, dtype=torch.uint8, offset=tensor.offset, count=tensor.num_bytes
        )

    def _in_order(self, rows: torch.Tensor, tensor: TensorInfo) -> torch.Tensor:
        """Of all rows of a tensor, or those of some heads: the converter keeps heads together."""
        if tensor.name.split(".")[-2] not in self._paired:
            return rows
        return halves_from_pairs(rows, len(rows) // self._head_dim)


def halves_from_pairs(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order of rotated projections.

    It rotates neighbours (0, 1), (2, 3), ...; the hub's code rotates i with i + head_dim / 2.
    """
    pairs = rows.view(num_heads, rows.shape[0] // num_heads // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(rows.shape)
