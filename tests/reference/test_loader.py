"""Weights bit by bit: against the gguf package, and the same model from both file formats."""

import importlib
import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from safetensors.torch import save_file

from nodeserve.checkpoint import Checkpoint, resolve
from nodeserve.config import ModelConfig
from nodeserve.errors import ModelError
from nodeserve.gguf import TENSOR_TYPES, TensorInfo
from nodeserve.model.dequantise import dequantise
from nodeserve.model.loader import gguf_name, halves_from_pairs, open_weights
from nodeserve.text import Tokenizer
from tests.fakes.gguf_writer import write_gguf
from tests.reference.awkward import awkward_strings
from tests.reference.embedded import needs_embedded_model
from tests.reference.export import export_folder, tensor_names

pytestmark = pytest.mark.usefixtures("one_thread")

TYPES = {kind.name: kind for kind in TENSOR_TYPES.values()}


def reference(packed: Any, name: str) -> Any | None:
    """What the gguf package makes of the bytes; None where it has no code for the type."""
    with np.errstate(all="ignore"):
        try:
            return quants.dequantize(packed, GGMLQuantizationType[name])
        except NotImplementedError:
            return None


def tensor_info(name: str, shape: tuple[int, ...], num_bytes: int) -> TensorInfo:
    return TensorInfo("t", shape, TYPES[name], 0, num_bytes)


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal bit patterns; any NaN equals any other."""
    number = ~(torch.isnan(ours) & torch.isnan(theirs))
    width = torch.int16 if ours.element_size() == 2 else torch.int32
    return torch.equal(ours.view(width)[number], theirs.view(width)[number])


def test_type_sizes_are_those_of_the_gguf_package() -> None:
    ours = {i: (t.name, t.block_size, t.block_bytes) for i, t in TENSOR_TYPES.items()}
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    assert {i: ours[i] for i in theirs if i in ours} == {i: theirs[i] for i in theirs if i in ours}


@pytest.mark.parametrize("name", TYPES)
def test_any_bytes_of_every_type_dequantise_as_in_the_gguf_package(name: str) -> None:
    kind = TYPES[name]
    num_blocks = 3 * (32 * 1024 // kind.block_size) // 2  # one chunk and a half
    packed = np.random.default_rng(7).integers(
        0, 256, num_blocks * kind.block_bytes, dtype=np.uint8
    )
    expected = reference(packed, name)
    info = tensor_info(name, (3, num_blocks * kind.block_size // 3), packed.size)
    data = torch.from_numpy(packed)
    if expected is None:
        if name != "F64":
            with pytest.raises(ModelError, match=f"type {name}.*cannot dequantise"):
                dequantise(data, info, torch.float32)
        return
    flat = torch.from_numpy(expected.reshape(-1).copy())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = dequantise(data, info, dtype)
        assert values.shape == info.shape and values.dtype is dtype
        assert same_bits(values.reshape(-1), flat.to(dtype))


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("F16", 1e-3), ("BF16", 0.02), ("Q8_0", 0.03), ("Q5_1", 0.2), ("Q4_0", 0.5), ("Q4_1", 0.4)],
)
def test_quantised_numbers_come_back(name: str, tolerance: float) -> None:
    numbers = np.random.default_rng(3).standard_normal((8, 512), dtype=np.float32)
    packed = quants.quantize(numbers, GGMLQuantizationType[name]).view(np.uint8)
    data = torch.from_numpy(packed.reshape(-1).copy())
    values = dequantise(data, tensor_info(name, (8, 512), data.numel()), torch.float32)
    assert np.abs(values.numpy() - numbers).max() < tolerance


def test_rotated_rows_change_places_as_transformers_has_it() -> None:
    """Our undoing against llama.cpp's doing, written as its converter writes it."""
    heads, rows, columns = 3, 48, 5
    hub = torch.randn(rows, columns)
    stored = hub.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2)
    assert torch.equal(halves_from_pairs(stored.reshape(rows, columns), heads), hub)
    bias = torch.randn(rows)
    stored = bias.reshape(heads, 2, rows // heads // 2).transpose(1, 2)
    assert torch.equal(halves_from_pairs(stored.reshape(rows), heads), bias)


@needs_embedded_model
def test_names_and_row_order_are_those_of_transformers() -> None:
    """The real model through transformers' own GGUF mapping, tensor by tensor."""
    pytest.importorskip("transformers")
    gguf_utils: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    checkpoint = resolve()
    weights = open_weights(checkpoint, torch.float32)
    config = checkpoint.config
    processor: Any = gguf_utils.TENSOR_PROCESSORS["llama"](
        config={
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
        }
    )
    unordered = open_weights(
        replace(checkpoint, config=replace(config, architecture="qwen2")), torch.float32
    )
    for layer in (0, config.num_layers - 1):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            name = f"model.layers.{layer}.self_attn.{part}.weight"
            stored = unordered(name).numpy()
            theirs = processor.process(stored, gguf_name(name)).weights
            assert np.array_equal(weights(name).numpy(), theirs), name


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("export")
    return {
        "single": export_folder(resolve(), parent / "single", torch.bfloat16),
        "sharded": export_folder(resolve(), parent / "sharded", torch.bfloat16, num_files=3),
    }


@needs_embedded_model
@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_a_model_is_the_same_from_both_formats(folders: dict[str, Path], layout: str) -> None:
    gguf, folder = resolve(), resolve(str(folders[layout]))
    assert folder.config == gguf.config
    first, second = open_weights(gguf, torch.bfloat16), open_weights(folder, torch.bfloat16)
    for name in tensor_names(gguf.config):
        assert torch.equal(first(name), second(name)), name
    assert "lm_head.weight" not in first and "lm_head.weight" not in second
    wide = open_weights(folder, torch.float32)("model.norm.weight")
    assert wide.dtype is torch.float32
    assert torch.equal(wide, first("model.norm.weight").float())


@needs_embedded_model
def test_a_model_has_the_same_text_from_both_formats(folders: dict[str, Path]) -> None:
    gguf, folder = Tokenizer.load(resolve().path), Tokenizer.load(folders["single"])
    for text in awkward_strings():
        assert folder.encode(text) == gguf.encode(text)
        ids = gguf.encode(text)
        assert folder.decode(ids, False) == gguf.decode(ids, False)
    messages = [{"role": "user", "content": "Hi"}]
    assert folder.chat_prompt(messages) == gguf.chat_prompt(messages)
    assert folder.special_ids == gguf.special_ids
    assert folder.eos_token_id == gguf.eos_token_id


# -- what can be wrong --------------------------------------------------------------------------


@needs_embedded_model
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.99.mlp.up_proj.weight", "x", ""])
def test_a_missing_tensor_is_named(folders: dict[str, Path], name: str) -> None:
    for checkpoint in (resolve(), resolve(str(folders["single"]))):
        with pytest.raises(ModelError, match=f"has no tensor {name}"):
            open_weights(checkpoint, torch.float32)(name)


def damaged(folder: Path, files: dict[str, bytes]) -> Checkpoint:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    config = ModelConfig("llama", 8, 4, 6, 1, 1, 1, 4, 16, 1e-5, 1e4)
    return Checkpoint(folder, "safetensors", config, "damaged")


INDEX = "model.safetensors.index.json"
EMPTY = struct.pack("<Q", 2) + b"{}"


def index(file: object) -> dict[str, bytes]:
    return {INDEX: json.dumps({"weight_map": {"x": file}}).encode()}


def safetensors(header: bytes, num_bytes: int = 64) -> dict[str, bytes]:
    return {"model.safetensors": struct.pack("<Q", len(header)) + header + bytes(num_bytes)}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.safetensors": b"nonsense and more"}, "cannot read .*model.safetensors"),
        ({"a.safetensors": EMPTY, "b.safetensors": EMPTY}, "2 .*safetensors files and no model"),
        ({INDEX: b"{}"}, "weight_map must map"),
        (index("../y.safetensors"), "weight_map must map"),
        (index(".."), "weight_map must map"),
        (index(""), "weight_map must map"),
        (index("/etc/y.safetensors"), "weight_map must map"),
        (index("a\0.safetensors"), "weight_map must map"),
        (index("pytorch_model.bin"), r"weight_map must map tensor names to \*.safetensors"),
        (index(7), "weight_map must map"),
        (index("gone.safetensors"), "cannot read .*gone"),
        ({**index("e.safetensors"), "e.safetensors": EMPTY}, "cannot read x"),
    ],
)
def test_damaged_folders_are_model_errors(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        open_weights(damaged(tmp_path, files), torch.float32)("x")


@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors": b""},
        {"model.safetensors": b"\xff" * 8},
        {"model.safetensors": struct.pack("<Q", 2**63) + b"{}"},
        safetensors(b"{"),
        safetensors(b"[" * 100_000),
        safetensors(b'{"x":' * 1000),
        safetensors(b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,15]}}'),
        safetensors(b'{"x":{"dtype":"F32","shape":[32],"data_offsets":[0,128]}}'),
        safetensors(b'{"x":{"dtype":"F32","shape":[16],"data_offsets":[64,0]}}'),
        safetensors(b'{"x":{"dtype":"F32","shape":[-16],"data_offsets":[0,64]}}'),
        safetensors(b'{"x":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,64]}}'),
        safetensors(
            b'{"x":{"dtype":"F32","shape":[16],"data_offsets":[0,64]},'
            b'"y":{"dtype":"F32","shape":[16],"data_offsets":[0,64]}}'
        ),
        safetensors(b'{"x":{"dtype":"pickle","shape":[16],"data_offsets":[0,64]}}'),
    ],
    ids=range(13),
)
def test_headers_that_lie_are_model_errors(tmp_path: Path, files: dict[str, bytes]) -> None:
    with pytest.raises(ModelError, match="cannot read"):
        open_weights(damaged(tmp_path, files), torch.float32)("x")


def test_weights_that_are_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="not a regular file"):
        open_weights(damaged(tmp_path, {}), torch.float32)


NORM = "model.norm.weight"


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    """Kernels take the shapes from the configuration: another one would be read past its end."""
    save_file({NORM: torch.ones(4)}, tmp_path / "model.safetensors")
    assert open_weights(damaged(tmp_path, {}), torch.float32)(NORM).tolist() == [1.0] * 4
    for shape in ((3,), (5,), (4, 1), ()):
        save_file({NORM: torch.ones(shape)}, tmp_path / "model.safetensors")
        with pytest.raises(ModelError, match=r"norm.weight has the shape .* expected \(4,\)"):
            open_weights(damaged(tmp_path, {}), torch.float32)(NORM)


def test_a_gguf_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = damaged(tmp_path, {})
    path = write_gguf(tmp_path / "m.gguf", {}, {"blk.0.attn_q.weight": ((3, 4), 0, bytes(48))})
    weights = open_weights(Checkpoint(path, "gguf", folder.config, "damaged"), torch.float32)
    with pytest.raises(ModelError, match=r"the shape \(3, 4\), expected \(4, 4\)"):
        weights("model.layers.0.self_attn.q_proj.weight")
