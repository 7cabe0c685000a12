"""Parts of a model: together they are the whole, and each rank can compute with its own."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodeserve.config import ModelConfig, MoeConfig
from nodeserve.errors import ModelError
from nodeserve.layout import Shape
from nodeserve.shards import Axis, Cut, Place, Shard, check_fits, inner_range, share


def model(num_heads: int, num_kv_heads: int, vocab_size: int = 1000) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=200,
        num_layers=7,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=16,
        max_position=128,
        norm_eps=1e-5,
        rope_theta=1e4,
    )


def ranks(config: ModelConfig, tp: int) -> list[Shard]:
    return [Shard(config, Place(tp_rank=rank, tp=tp)) for rank in range(tp)]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_every_head_is_once_beside_its_own_kv_head(
    num_kv_heads: int, group: int, data: st.DataObject
) -> None:
    config = model(num_kv_heads * group, num_kv_heads)
    found = ranks(config, data.draw(st.integers(1, config.num_heads)))
    assert [head for shard in found for head in shard.heads] == list(range(config.num_heads))
    for shard in found:
        local = shard.config
        assert local.num_heads % local.num_kv_heads == 0
        each = local.num_heads // local.num_kv_heads
        needed = [head // group for head in shard.heads]
        held = [shard.kv_heads[head // each] for head in range(local.num_heads)]
        assert needed == held


@given(st.integers(1, 3000), st.integers(1, 16))
def test_shares_are_neighbours_of_nearly_one_size(total: int, num_parts: int) -> None:
    parts = [share(total, num_parts, index) for index in range(num_parts)]
    assert [one for part in parts for one in part] == list(range(total))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1 and sizes[0] == min(sizes)


@given(st.integers(16, 20000), st.integers(1, 16))
def test_columns_of_an_mlp_are_cut_between_blocks(size: int, tp: int) -> None:
    parts = [inner_range(size, rank, tp) for rank in range(tp)]
    assert parts[0].start == 0 and parts[-1].stop == size
    assert all(first.stop == second.start for first, second in pairwise(parts))
    assert all(len(part) for part in parts)
    if size >= 32 * tp:
        assert all(part.start % 32 == 0 for part in parts)
    if size % (256 * tp) == 0:
        assert {len(part) for part in parts} == {size // tp}


def test_a_known_model_is_cut_where_files_keep_blocks_of_256() -> None:
    assert [len(inner_range(14336, rank, 8)) for rank in range(8)] == [1792] * 8
    assert [len(inner_range(11008, rank, 2)) for rank in range(2)] == [5504] * 2
    assert [len(inner_range(200, rank, 2)) for rank in range(2)] == [96, 104]


@pytest.mark.parametrize(("vocab_size", "tp"), [(1000, 2), (100, 4), (49152, 2), (50257, 3)])
def test_vocabulary_rows_are_equally_many_on_every_rank(vocab_size: int, tp: int) -> None:
    found = ranks(model(8, 8, vocab_size), tp)
    assert [row for shard in found for row in shard.vocab] == list(range(vocab_size))
    assert all(shard.vocab.start in (rank * shard.vocab_rows, vocab_size)
               for rank, shard in enumerate(found))  # fmt: skip
    assert len({shard.vocab_rows for shard in found}) == 1
    assert all(len(shard.vocab) <= shard.vocab_rows for shard in found)


def test_one_rank_has_the_vocabulary_as_it_is() -> None:
    assert Shard(model(8, 8, 1001)).vocab_rows == 1001


def test_dimensions_are_cut_by_what_they_are_made_of() -> None:
    shard = Shard(model(num_heads=8, num_kv_heads=2), Place(tp_rank=2, tp=4))
    assert shard.span(Cut(0, Axis.HEADS), 8 * 16) == range(64, 96)
    assert shard.span(Cut(0, Axis.HEADS), 8 * 24) == range(96, 144)
    assert shard.span(Cut(0, Axis.KV_HEADS), 2 * 16) == range(16, 32)
    assert shard.span(Cut(1, Axis.INNER), 512) == range(256, 384)
    assert shard.span(Cut(0, Axis.VOCAB), 1000) == range(512, 768)


def test_layers_go_to_stages() -> None:
    stages = [Shard(model(8, 8), Place(pp_rank=stage, pp=3)).layers for stage in range(3)]
    assert stages == [range(2), range(2, 4), range(4, 7)]


def test_a_place_is_its_rank_in_the_shape() -> None:
    shape = Shape(tp=3, pp=2, ep=4)
    places = [Place.of(shape, rank) for rank in range(shape.num_workers)]
    assert [place.rank for place in places] == list(range(24))
    assert all(place.shape == shape for place in places)
    assert [place.rank for place in places if place.is_leader] == [0, 6, 12, 18]
    assert places[4] == Place(1, 3, 1, 2, 0, 4)
    assert places[4].is_last and not places[4].is_first


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Shape(tp=9), "tp9 does not fit a model of 8 attention heads: use tp8 or less"),
        (Shape(pp=8), "pp8 does not fit a model of 7 layers: use pp7 or less"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_what_does(shape: Shape, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_fits(model(8, 2), shape)
    check_fits(model(8, 2), Shape(tp=8, pp=7))


@pytest.mark.parametrize(
    ("dense", "moe"),
    [
        (3, None),
        (200, MoeConfig(4, 2, intermediate_size=3)),
        (200, MoeConfig(4, 2, intermediate_size=8, shared_intermediate_size=3)),
        (3, MoeConfig(4, 2, intermediate_size=8, dense_layers=(0,))),
    ],
)
def test_every_tensor_rank_needs_a_column_of_every_mlp(dense: int, moe: MoeConfig | None) -> None:
    config = replace(model(8, 2), intermediate_size=dense, moe=moe)
    with pytest.raises(ModelError, match="a model of 3 columns in its narrowest MLP: use tp3"):
        check_fits(config, Shape(tp=4))
    check_fits(config, Shape(tp=3))


def test_ranks_without_a_layer_of_experts_have_nothing_to_share() -> None:
    """They would call each other into passes in which nobody waits for anybody."""
    config = replace(model(8, 2), moe=MoeConfig(4, 2, 8, dense_layers=tuple(range(7))))
    with pytest.raises(ModelError, match="of which this model has 0: use tp"):
        check_fits(config, Shape(ep=2))
    check_fits(replace(config, moe=MoeConfig(4, 2, 8, dense_layers=(0,))), Shape(ep=4))


def test_the_width_of_an_mlp_that_no_layer_has_does_not_count() -> None:
    config = replace(model(8, 2), intermediate_size=3, moe=MoeConfig(4, 2, intermediate_size=8))
    check_fits(config, Shape(tp=8))
