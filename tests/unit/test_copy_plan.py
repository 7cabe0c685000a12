"""The copy plan against numpy: a whole model's block is cut into shards and put together again."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodeserve.errors import ConfigError
from nodeserve.policy.copy_plan import (
    CopyRun,
    PageGeometry,
    PageShard,
    copy_runs,
    pulls,
    shards,
)

GEOMETRY = PageGeometry(num_layers=4, num_kv_heads=4, block_size=2, head_dim=8, value_bytes=2)


def whole_block(geometry: PageGeometry) -> np.ndarray:
    """[num_layers, parts, num_kv_heads, block_size * head_dim], every value another one."""
    shape = (
        geometry.num_layers,
        geometry.parts,
        geometry.num_kv_heads,
        geometry.block_size * geometry.head_dim,
    )
    return np.arange(1, np.prod(shape) + 1, dtype=f"uint{8 * geometry.value_bytes}").reshape(shape)


def block_of(shard: PageShard) -> np.ndarray:
    """The bytes of a block as the worker of this shard keeps it."""
    layers, heads = shard.layers, shard.kv_heads
    mine = whole_block(shard.geometry)[layers.start : layers.stop, :, heads.start : heads.stop]
    return np.ascontiguousarray(mine).reshape(-1).view(np.uint8)


def pull_all(target: PageShard, sources: Sequence[PageShard], first: int) -> np.ndarray:
    arrived = np.zeros(target.block_bytes, np.uint8)
    times = np.zeros(target.block_bytes, np.uint8)
    for pull in pulls(target, sources, first):
        block = block_of(sources[pull.source_index])
        for run in pull.runs:
            there = slice(run.target, run.target + run.num_bytes)
            arrived[there] = block[run.source : run.source + run.num_bytes]
            times[there] += 1
    assert (times == 1).all()
    return arrived


@st.composite
def pairs(draw: st.DrawFn) -> tuple[PageGeometry, tuple[int, int], tuple[int, int], int]:
    """A geometry, (tp, pp) of both instances and where to begin."""
    num_kv_heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    geometry = PageGeometry(
        num_layers=draw(st.integers(1, 7)),
        num_kv_heads=num_kv_heads,
        block_size=draw(st.integers(1, 3)),
        head_dim=draw(st.integers(1, 3)),
        value_bytes=draw(st.sampled_from([2, 4])),
        parts=draw(st.sampled_from([1, 2])),
    )
    shape = st.tuples(st.integers(1, 16), st.integers(1, geometry.num_layers))
    return geometry, draw(shape), draw(shape), draw(st.integers(0, 40))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(pairs())
def test_every_value_arrives_once_from_the_right_place(
    case: tuple[PageGeometry, tuple[int, int], tuple[int, int], int],
) -> None:
    geometry, target_shape, source_shape, first = case
    sources = shards(geometry, *source_shape)
    for target in shards(geometry, *target_shape):
        assert (pull_all(target, sources, first) == block_of(target)).all()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(pairs())
def test_runs_have_gaps_between_them_on_one_side_at_least(
    case: tuple[PageGeometry, tuple[int, int], tuple[int, int], int],
) -> None:
    geometry, target_shape, source_shape, _ = case
    for target in shards(geometry, *target_shape)[:4]:
        for source in shards(geometry, *source_shape)[:4]:
            runs = copy_runs(target, source)
            for run, following in zip(runs, runs[1:], strict=False):
                assert run.target < following.target
                assert (run.target + run.num_bytes, run.source + run.num_bytes) != (
                    following.target,
                    following.source,
                )


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 3), (4, 2), (8, 1)])
def test_equal_shapes_move_one_run_from_the_worker_of_the_same_number(tp: int, pp: int) -> None:
    same = shards(GEOMETRY, tp, pp)
    for number, shard in enumerate(same):
        (pull,) = pulls(shard, same, first=number)
        assert pull.source_index == number
        assert pull.runs == (CopyRun(0, 0, shard.block_bytes),)


def test_unequal_heads_need_a_run_for_each_layer_and_part() -> None:
    whole, half = shards(GEOMETRY, 1)[0], shards(GEOMETRY, 2)[1]
    page = GEOMETRY.page_bytes
    runs = copy_runs(target=half, source=whole)
    assert len(runs) == GEOMETRY.num_layers * 2
    assert runs[1] == CopyRun(target=2 * page, source=(4 + 2) * page, num_bytes=2 * page)


def test_pipeline_stages_move_one_run() -> None:
    whole, last = shards(GEOMETRY)[0], shards(GEOMETRY, pp=4)[3]
    layer_bytes = 2 * 4 * GEOMETRY.page_bytes
    assert copy_runs(last, whole) == (CopyRun(0, 3 * layer_bytes, layer_bytes),)
    assert copy_runs(last, shards(GEOMETRY, pp=4)[0]) == ()


def test_replicas_of_a_head_share_the_work() -> None:
    """8 ranks over 4 heads: ranks 2 and 3 hold head 1, and each serves the peer of its number."""
    eight = shards(GEOMETRY, 8)
    assert eight[2].kv_heads == eight[3].kv_heads == range(1, 2)
    asked = [pulls(eight[rank], eight, first=rank)[0].source_index for rank in (2, 3)]
    assert asked == [2, 3]


def test_a_latent_page_is_whole_on_every_rank() -> None:
    latent = PageGeometry(3, 1, block_size=16, head_dim=576, value_bytes=2, parts=1)
    (pull,) = pulls(shards(latent, 4)[2], shards(latent, 2), first=2)
    assert pull.source_index == 0
    assert pull.runs == (CopyRun(0, 0, 3 * 16 * 576 * 2),)


def test_readers_of_latents_ask_each_holder_equally_often() -> None:
    latent = PageGeometry(3, 1, block_size=16, head_dim=576, value_bytes=2, parts=1)
    sources, readers = shards(latent, tp=2, pp=3), shards(latent, tp=4)
    asked = Counter(
        pull.source_index
        for rank, reader in enumerate(readers)
        for pull in pulls(reader, sources, first=rank)
    )
    assert asked == dict.fromkeys(range(6), 2)


def test_what_nobody_has_is_named() -> None:
    with pytest.raises(ConfigError, match="no source has layer 2, KV head 0"):
        pulls(shards(GEOMETRY)[0], shards(GEOMETRY, pp=2)[:1])


def test_sources_that_overlap_in_part_are_refused() -> None:
    odd = [PageShard(GEOMETRY, range(4), range(3)), PageShard(GEOMETRY, range(4), range(2, 4))]
    with pytest.raises(ConfigError, match="source 1 overlaps in part"):
        pulls(shards(GEOMETRY)[0], odd)


def test_pools_of_different_models_are_refused() -> None:
    other = PageGeometry(4, 4, block_size=2, head_dim=8, value_bytes=4)
    with pytest.raises(ConfigError, match="different pages"):
        copy_runs(shards(GEOMETRY)[0], shards(other)[0])


@pytest.mark.parametrize("layers", [range(0), range(3, 5), range(-1, 2), range(0, 4, 2)])
def test_a_shard_lies_within_the_model(layers: range) -> None:
    with pytest.raises(ConfigError, match="layers must be a rising range within 4"):
        PageShard(GEOMETRY, layers, range(4))
