"""Layouts that a plan tries: what fits the GPUs, in shapes that were measured and by formula."""

from dataclasses import replace

import pytest

from nodeserve.errors import ConfigError
from nodeserve.layout import Shape, parse_layout
from nodeserve.plan.candidates import (
    Candidate,
    all_candidates,
    by_formula,
    gpus_of,
    kinds_of,
    neighbours,
    split_layouts,
    variations,
)
from nodeserve.policy.sizes import Anatomy
from tests.unit.test_planner import FAMILY, PLAIN


def test_layouts_fit_the_gpus_and_leave_no_room_for_another_prefill_instance() -> None:
    kinds = kinds_of(FAMILY, 4)
    layouts = list(split_layouts(kinds, 4))
    names = [str(layout) for layout in layouts]
    assert len(names) == len(set(names))
    assert {"3p1d", "1p3d", "1p:tp2,2d", "2p,1d:tp2", "1p:tp2,1d:tp2"} <= set(names)
    assert "1p,1d:tp2" not in names  # one GPU would be left for another p
    for layout in layouts:
        assert gpus_of(layout, kinds) <= 4
        assert parse_layout(str(layout)) == layout


def test_mixed_layouts_come_with_several_chunks() -> None:
    candidates = all_candidates(kinds_of(PLAIN, 2), 2, 64)
    assert [one.max_num_batched_tokens for one in candidates if one.kind == "mixed"] == [256, 1024]


def test_other_shapes_than_those_asked_for_are_left_out() -> None:
    assert [one.shape for one in kinds_of(FAMILY, 8, shapes=[Shape()])] == [Shape()]
    with pytest.raises(ConfigError, match="it has one worker, tp2"):
        kinds_of(FAMILY, 2, shapes=[Shape(pp=2)])
    with pytest.raises(ConfigError, match="needs 8 GPUs or more, 4 given"):
        kinds_of(replace(PLAIN, num_gpus=8), 4)


SHAPED = replace(PLAIN, anatomy=Anatomy(16, 4, 4096, 1e8))
SPARSE = replace(PLAIN, anatomy=Anatomy(16, 4, 4096, 1e8, 0.0, 8e7, num_experts=4, num_active=2))


def test_what_one_worker_takes_tells_of_shapes_that_nobody_measured() -> None:
    names = [str(kind.shape) for kind in kinds_of(SHAPED, 4)]
    assert names == ["", "tp2", "pp2", "tp4", "tp2.pp2", "pp4"]
    layouts = {str(layout) for layout in split_layouts(kinds_of(SHAPED, 4), 4)}
    assert {"1p:tp2,2d", "2p,1d:pp2", "1p:pp2,1d:tp2"} <= layouts
    assert [kind.shape for kind in kinds_of(SHAPED, 4, shapes=[Shape()])] == [Shape()]
    assert [str(one) for one in by_formula(SHAPED, ["1p:tp2,2d", "4m"])] == ["tp2"]
    assert by_formula(PLAIN, ["4m"]) == by_formula(FAMILY, ["1p:tp2,2d"]) == []


def test_ranks_that_share_experts_are_tried_where_there_are_some() -> None:
    names = {str(kind.shape) for kind in kinds_of(SPARSE, 8)}
    assert {"ep2", "ep4", "tp2.ep4", "tp2.pp2"} <= names
    assert {"pp2.ep2", "tp2.pp2.ep2", "pp2.ep4"} <= names
    assert not {name for name in names if "ep8" in name}
    assert {kind.shape.ep for kind in kinds_of(SPARSE, 8, eps=(4,))} == {4}
    assert {kind.shape.ep for kind in kinds_of(SHAPED, 8, eps=(4,))} == {4}
    layouts = {str(layout) for layout in split_layouts(kinds_of(SPARSE, 8), 8)}
    assert {"1p:ep4,1d:ep4", "1p:tp2,3d:ep2"} <= layouts


def test_neighbours_move_one_instance() -> None:
    found = {one.layout for one in neighbours(Candidate("2p2d", 1024))}
    assert found == {"1p3d", "1p2d1m", "3p1d", "2p1d1m"}
    assert {one.layout for one in neighbours(Candidate("1m", 1024))} == set()


def test_variations_keep_to_what_a_server_takes() -> None:
    tried = variations(Candidate("2p2d", 1024), 600)
    assert {one.max_num_batched_tokens for one in tried if one.window_s is None} == {
        600,
        2048,
        4096,
    }
    assert [one.window_s for one in tried if one.window_s is not None] == [0.0]
    assert all(one.window_s is None for one in variations(Candidate("1p2d", 1024), 600))
