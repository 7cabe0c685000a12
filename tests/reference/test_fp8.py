"""Checkpoints whose matrices are 8-bit floats with a scale for each block."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nodeserve.checkpoint import Checkpoint
from nodeserve.config_readers import folder_config
from nodeserve.errors import ModelError
from nodeserve.model.fp8 import from_fp8, num_blocks
from nodeserve.model.loader import Uploaded, open_weights
from nodeserve.model.part import Part
from tests.reference import deepseek

BLOCK = (32, 48)
NAME = "model.layers.0.self_attn.kv_b_proj.weight"  # [6 * 56, 64]: cut blocks in both directions


def scaled(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in 8 bits and its scales: the largest number of each block becomes 448."""
    rows, columns = num_blocks(weight.shape, block)
    scales = torch.empty(rows, columns)
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            part = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            scales[i, j] = weight[part].abs().max() / 448
            stored[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
    return stored, scales


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint whose layers' matrices are in FP8, as V3's are."""
    deepseek.reference("v3").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        tensors[name], tensors[f"{name}_scale_inv"] = scaled(tensors[name], BLOCK)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(folder, "safetensors", folder_config(folder), "tiny")


class Moved:
    """An upload that only counts."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.num_bytes = 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        self.num_bytes += tensor.nbytes
        return tensor.clone()


def test_matrices_come_back_as_they_were(folder: Path) -> None:
    """Within what 8 bits can say, a sixteenth of a number, or of its block's largest at 2^-9."""
    plain = deepseek.reference("v3").state_dict()[NAME]
    weights = open_weights(checkpoint(folder), torch.float32)
    restored = weights(NAME)
    assert restored.dtype == torch.float32
    assert ((restored - plain).abs() <= plain.abs() / 16 + plain.abs().max() / 2**9).all()
    stored = load_file(folder / "model.safetensors")
    expanded = stored[f"{NAME}_scale_inv"].repeat_interleave(32, 0).repeat_interleave(48, 1)
    assert torch.equal(restored, stored[NAME].float() * expanded[:336, :64])
    assert open_weights(checkpoint(folder), torch.bfloat16)(NAME).dtype == torch.bfloat16


def test_a_device_gets_the_bytes_of_the_file(folder: Path) -> None:
    upload = Moved()
    weights = open_weights(checkpoint(folder), torch.bfloat16, upload=upload)
    assert isinstance(weights, Uploaded)
    assert torch.equal(weights(NAME), open_weights(checkpoint(folder), torch.bfloat16)(NAME))
    assert upload.num_bytes == 336 * 64 + 11 * 2 * 4


def test_parts_are_restored_by_the_scales_of_their_place() -> None:
    weight, scales = scaled(torch.randn(100, 130), (16, 32))
    whole = from_fp8(weight, scales, (16, 32), torch.float32)
    part = from_fp8(weight[37:90, 50:129], scales, (16, 32), torch.float32, 37, 50)
    assert torch.equal(part, whole[37:90, 50:129])


@pytest.mark.parametrize(
    "part", [Part(0, lambda n: range(37, n - 5)), Part(1, lambda n: range(50, n))]
)
def test_a_part_of_a_matrix_is_that_of_the_whole(folder: Path, part: Part) -> None:
    """As a tensor-parallel rank reads it, wherever the cut is within a block."""
    weights = open_weights(checkpoint(folder), torch.float32)
    whole = weights(NAME)
    assert torch.equal(weights(NAME, part), whole[part.within(whole.shape)])


def changed(folder: Path, **tensors: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    kept: dict[str, torch.Tensor | None] = {**load_file(path), **tensors}
    save_file({name: value for name, value in kept.items() if value is not None}, path)


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({f"{NAME}_scale_inv": None}, "stored as torch.float8_e4m3fn.*_scale_inv beside it"),
        ({f"{NAME}_scale_inv": torch.ones(11, 1)}, r"shape \(11, 1\), expected \(11, 2\)"),
        ({NAME: torch.zeros(336, 64, dtype=torch.float8_e5m2)}, "stored as torch.float8_e5m2"),
        ({NAME: torch.zeros(336, 64, dtype=torch.int8)}, "stored as torch.int8"),
    ],
)
def test_other_8_bit_matrices_are_refused(
    folder: Path, tensors: dict[str, torch.Tensor | None], complaint: str
) -> None:
    changed(folder, **tensors)
    with pytest.raises(ModelError, match=complaint):
        open_weights(checkpoint(folder), torch.float32)(NAME)


def test_without_a_word_in_the_configuration_scales_are_not_guessed(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="a quantization_config in config.json"):
        open_weights(checkpoint(folder), torch.float32)(NAME)
