"""Parts of tensors as a rank reads them: bit by bit what is there in the whole tensor."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nodeserve.checkpoint import Checkpoint, resolve
from nodeserve.config import ModelConfig
from nodeserve.gguf import TENSOR_TYPES
from nodeserve.model.dummy import DummyWeights
from nodeserve.model.families import cuts_of, shape_of
from nodeserve.model.loader import GgufWeights, Source, open_stored, open_weights
from nodeserve.model.parallel import ShardWeights
from nodeserve.model.part import Part
from nodeserve.model.quantised import Quantised, dense, padded
from nodeserve.shards import Place, Shard
from tests.fakes.gguf_writer import write_gguf
from tests.reference.blocks import random_blocks
from tests.reference.embedded import needs_embedded_model
from tests.reference.export import tensor_names
from tests.reference.tiny_models import FAMILIES, SMALL

pytestmark = pytest.mark.usefixtures("one_thread")

TYPE_IDS = {kind.name: number for number, kind in TENSOR_TYPES.items()}
NAME = "model.layers.0.mlp.down_proj.weight"
ROWS, COLUMNS = Part(0, lambda size: range(32, size)), Part(1, lambda size: range(256, size))


def part_of(whole: torch.Tensor, part: Part) -> torch.Tensor:
    span = part.span(whole.shape[part.dim])
    return whole.narrow(part.dim, span.start, len(span))


def gguf_of(kind: str, folder: Path) -> GgufWeights:
    """A file with one matrix [96, 512] of this type."""
    config = replace(SMALL, architecture="qwen2", hidden_size=96, intermediate_size=512)
    blocks = random_blocks(kind, 96, 512, torch.float32).blocks
    tensors = {"blk.0.ffn_down.weight": ((96, 512), TYPE_IDS[kind], blocks.numpy().tobytes())}
    path = write_gguf(folder / "one.gguf", {}, tensors)
    return GgufWeights(Checkpoint(path, "gguf", config, "one"), torch.float32)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q8_0"])
@pytest.mark.parametrize("part", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_blocks_stay_as_they_are_where_no_cut_goes_through_one(
    kind: str, part: Part, tmp_path: Path
) -> None:
    weights = gguf_of(kind, tmp_path)
    kept = weights.as_quantised(NAME, part)
    assert isinstance(kept, Quantised)
    assert torch.equal(dense(kept), part_of(weights(NAME), part))
    assert torch.equal(weights(NAME, part), part_of(weights(NAME), part))


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0"])
def test_a_cut_through_blocks_gives_numbers(kind: str, tmp_path: Path) -> None:
    weights = gguf_of(kind, tmp_path)
    part = Part(1, lambda size: range(16, 272))
    found = weights.as_quantised(NAME, part)
    assert isinstance(found, torch.Tensor) and found.is_contiguous()
    assert torch.equal(found, part_of(weights(NAME), part))


def shards_of(config: ModelConfig, tp: int) -> list[Shard]:
    return [Shard(config, Place(tp_rank=rank, tp=tp)) for rank in range(tp)]


def expected_part(shard: Shard, name: str, whole: torch.Tensor) -> torch.Tensor:
    """By plain slicing, and zeros below the vocabulary."""
    cut = cuts_of(shard.whole).get(name.split(".")[-2])
    if cut is None or cut.dim >= whole.dim():
        return whole
    span = shard.span(cut, whole.shape[cut.dim])
    mine = whole.narrow(cut.dim, span.start, len(span))
    rows = shard.vocab_rows if whole.shape[0] == shard.whole.vocab_size else len(mine)
    return torch.cat([mine, mine.new_zeros(rows - len(mine), *mine.shape[1:])])


def check_parts(source: Source, config: ModelConfig, tp: int) -> None:
    for shard in shards_of(config, tp):
        weights = ShardWeights(source, shard)
        for name in tensor_names(config):
            found = dense(weights(name))
            assert torch.equal(found, expected_part(shard, name, source(name))), name


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_read_their_rows_and_columns_of_safetensors(
    family: str, tp: int, tmp_path: Path
) -> None:
    config = FAMILIES[family]
    made = DummyWeights(config, torch.bfloat16)
    state = {name: made(name) for name in tensor_names(config)}
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, "safetensors", config, "tiny")
    check_parts(open_weights(checkpoint, torch.bfloat16), config, tp)
    check_parts(made, config, tp)


@needs_embedded_model
def test_ranks_read_their_rows_and_columns_of_a_real_gguf() -> None:
    """Rotated rows among them, which the file has in another order."""
    checkpoint = resolve()
    config = replace(checkpoint.config, num_layers=1)
    found = replace(checkpoint, config=checkpoint.config)
    plain, stored = open_weights(found, torch.bfloat16), open_stored(found, torch.bfloat16)
    for shard in shards_of(config, 2):
        weights = ShardWeights(stored, shard)
        for name in tensor_names(config):
            if name != "model.norm.weight":
                expected = expected_part(shard, name, plain(name))
                assert torch.equal(dense(weights(name)), expected), name
        assert isinstance(weights(NAME), Quantised)


def test_zeros_below_a_quantised_matrix_are_zeros() -> None:
    matrix = random_blocks("Q8_0", 5, 64, torch.float32)
    longer = padded(matrix, 8)
    assert isinstance(longer, Quantised) and longer.shape == (8, 64)
    assert torch.equal(dense(longer)[:5], dense(matrix))
    assert not dense(longer)[5:].any()
    assert padded(matrix, 5) is matrix


def test_dummy_rows_are_the_whole_tensor_s_without_making_it() -> None:
    weights = DummyWeights(SMALL, torch.float32)
    whole = weights("lm_head.weight")
    found = weights("lm_head.weight", Part(0, lambda size: range(100, 150)))
    assert found.untyped_storage().nbytes() == 50 * SMALL.hidden_size * 4
    assert torch.equal(found, whole[100:150])
    assert shape_of(SMALL, "lm_head.weight") == tuple(whole.shape)
