"""Reads a checkpoint's weights by the names that the hub gives them, whatever the file format.

`open_weights(checkpoint, dtype)` reads nothing yet; each `weights(name)` reads one tensor. Files
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
from nodeserve.model.quantised import Quantised, Weight, can_stay
from nodeserve.model_files import open_regular, read_json
from nodeserve.types import brief


class Upload(Protocol):
    """Takes tensors to a device."""

    device: torch.device

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a CPU tensor on the device; the tensor may go when this returns."""


class Source(Protocol):
    """Tensors by hub name, whichever way they come about."""

    def __contains__(self, name: object) -> bool: ...

    def __call__(self, name: str) -> torch.Tensor: ...


class Weights(ABC):
    """The tensors of one model, in one dtype, by hub name."""

    def __init__(self, where: str, config: ModelConfig, dtype: torch.dtype) -> None:
        self.where = where
        self.dtype = dtype
        self._config = config

    @abstractmethod
    def __contains__(self, name: object) -> bool: ...

    @abstractmethod
    def _read(self, name: str) -> torch.Tensor: ...

    def as_stored(self, name: str) -> torch.Tensor:
        """The whole tensor called `name`, on the CPU, in the file's own type if torch has it."""
        if name not in self:
            raise ModelError(f"{self.where} has no tensor {name}")
        return self._read(name)

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Kernels trust the shapes that the configuration gives: a file must have the same."""
        expected = shape_of(self._config, name)
        if expected is not None and shape != expected:
            raise ModelError(f"{self.where}: {name} has the shape {shape}, expected {expected}")

    def __call__(self, name: str) -> torch.Tensor:
        """The whole tensor called `name`, on the CPU."""
        return self.as_stored(name).to(self.dtype)


class Uploaded:
    """A file's tensors on a device; they become the model's type there."""

    def __init__(self, weights: Weights, upload: Upload) -> None:
        self._weights = weights
        self._upload = upload

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __call__(self, name: str) -> torch.Tensor:
        return self._upload(self._weights.as_stored(name)).to(self._weights.dtype)


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
) -> Callable[[str], Weight]:
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

    def _read(self, name: str) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self._open(self._places[name]).get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{self._places[name]}: cannot read {name}: {brief(error)}") from None
        self._check_shape(name, tuple(tensor.shape))
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
        self._heads: dict[str, int] = {}
        if checkpoint.config.architecture == "llama":  # only there the converter reorders rows
            self._heads = {
                "attn_q": checkpoint.config.num_heads,
                "attn_k": checkpoint.config.num_kv_heads,
            }

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and gguf_name(name) in self._file.tensors

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._file.tensors[gguf_name(name)]
        self._check_shape(name, tensor.shape)
        return self._in_order(dequantise(self._bytes_of(tensor), tensor, self.dtype), tensor)

    def as_quantised(self, name: str) -> Weight:
        """The tensor called `name`, its blocks as they are where that can be."""
        tensor = self._file.tensors.get(gguf_name(name))
        if tensor is None or not can_stay(tensor):
            return self(name)
        self._check_shape(name, tensor.shape)
        blocks = self._bytes_of(tensor).view(tensor.shape[0], -1)
        return Quantised(self._in_order(blocks, tensor), tensor.type, self.dtype)

    def _bytes_of(self, tensor: TensorInfo) -> torch.Tensor:
        return torch.frombuffer(
            self._file.data, dtype=torch.uint8, offset=tensor.offset, count=tensor.num_bytes
        )

    def _in_order(self, rows: torch.Tensor, tensor: TensorInfo) -> torch.Tensor:
        part = tensor.name.split(".")[-2]
        return halves_from_pairs(rows, self._heads[part]) if part in self._heads else rows


def halves_from_pairs(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order of rotated projections.

    It rotates neighbours (0, 1), (2, 3), ...; the hub's code rotates i with i + head_dim / 2.
    """
    pairs = rows.view(num_heads, rows.shape[0] // num_heads // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(rows.shape)
