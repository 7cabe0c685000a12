"""Shapes that a start would refuse are not planned with, and it is said why."""

from dataclasses import replace
from pathlib import Path

import pytest

from nodeserve.cli.startable import (
    fits,
    holds,
    knows_teams,
    on_gpus,
    startable,
    starts,
    whole_worker,
)
from nodeserve.config import EngineConfig, ModelConfig, MoeConfig
from nodeserve.errors import ConfigError
from nodeserve.expert_counts import facts_of, write_counts
from nodeserve.gpus import Gpu, Gpus
from nodeserve.layout import Shape
from nodeserve.policy.profile import Profile
from nodeserve.policy.profiles import FAMILIES, PROFILES
from nodeserve.policy.sizes import anatomy_of

CONTEXT = 2048
MODEL = ModelConfig("llama", 32_000, 1024, 2048, 4, 4, 2, 64, 4096, 1e-5, 1e4)
SPARSE = replace(MODEL, architecture="mixtral", moe=MoeConfig(4, 2, 2048))
ONE = PROFILES["llama-3.1-8b-h100"]


def profile_of(model: ModelConfig, **of_anatomy: float) -> Profile:
    anatomy = replace(anatomy_of(model), **of_anatomy)  # type: ignore[arg-type]
    token_bytes = model.kv_bytes_per_token(2)
    return replace(ONE, anatomy=anatomy, kv_bytes_per_token=token_bytes, max_model_len=CONTEXT)


def names(shapes: tuple[Shape, ...]) -> set[str]:
    return {str(shape) for shape in shapes}


def test_shapes_that_the_model_admits() -> None:
    found = startable(profile_of(MODEL), 8, (1,), [fits(MODEL)])
    assert names(found.shapes) == {"", "tp2", "tp4", "pp2", "pp4", "tp2.pp2", "tp2.pp4", "tp4.pp2"}
    assert any("tp8" in note and "4 attention heads" in note for note in found.notes())
    sparse = startable(profile_of(SPARSE), 4, (1,), [fits(SPARSE)])
    assert {"ep2", "ep4", "pp2.ep2", "tp2.ep2"} <= names(sparse.shapes)


def test_experts_that_the_model_does_not_have_are_not_shared() -> None:
    found = startable(profile_of(MODEL), 2, (1, 2), [fits(MODEL)])
    assert all(shape.ep == 1 for shape in found.shapes)
    whole = replace(ONE, anatomy=None)
    with pytest.raises(ConfigError, match="no shape of profile .* ep8: ep8 shares a layer"):
        startable(whole, 8, (8,), [fits(MODEL)])


def test_a_rank_of_several_gpus_starts_only_in_a_known_shape() -> None:
    with pytest.raises(ConfigError, match="of 8 GPUs as one rank"):
        startable(PROFILES["llama-2-70b-tp8-h100"], 8, (1,), [whole_worker])
    family = FAMILIES["opt-66b-a100"]
    assert Shape(tp=4) in startable(family, 8, (1,), [whole_worker]).shapes


def test_a_rank_has_room_for_a_request() -> None:
    tight = profile_of(MODEL).within(CONTEXT, 1500 * MODEL.kv_bytes_per_token(2))
    assert (tight.num_kv_tokens, tight.max_model_len) == (1500, CONTEXT)
    found = startable(tight, 2, (1,), [holds(CONTEXT, 16)])
    assert names(found.shapes) == {"tp2", "pp2"}
    assert found.notes() == [
        "not planned with one worker: a rank has no room for a request of 2048 tokens: lower"
        " --max-model-len, or raise --kv-memory"
    ]


def test_the_memory_of_a_family_is_that_of_its_workers() -> None:
    family = FAMILIES["opt-66b-a100"].within(512, 1 << 30)
    for (tp, pp), one in family.shapes.items():
        assert one.num_kv_tokens == tp * pp * (1 << 30) // one.kv_bytes_per_token
        assert one.max_model_len == 512


def test_pages_too_small_for_a_sequence_are_what_a_start_refuses() -> None:
    token_bytes = MODEL.kv_bytes_per_token(2)
    config = EngineConfig(kv_memory=(CONTEXT + 16) * token_bytes // 2)
    found = startable(profile_of(MODEL), 2, (1,), [starts(config, MODEL, CONTEXT)])
    assert names(found.shapes) == {"tp2", "pp2"}


def test_gpus_hold_a_part_where_they_do_not_hold_the_whole() -> None:
    whole_bytes = 2 * MODEL.num_weights
    small = Gpus(tuple(Gpu(index, "one", whole_bytes, whole_bytes) for index in range(2)))
    config = EngineConfig()
    found = startable(profile_of(MODEL), 2, (1,), [on_gpus(config, MODEL, CONTEXT, small)])
    assert names(found.shapes) == {"tp2", "pp2"}
    large = Gpus(tuple(Gpu(index, "one", 4 * whole_bytes, 4 * whole_bytes) for index in range(2)))
    shared = replace(config, gpus="0,0")
    found = startable(profile_of(MODEL), 2, (1,), [on_gpus(shared, MODEL, CONTEXT, large)])
    assert names(found.shapes) == {""}


def test_teams_of_cpu_workers_are_planned_where_they_were_measured() -> None:
    unknown = profile_of(MODEL, fixed_pool=True)
    found = startable(unknown, 2, (1,), [knows_teams(unknown)])
    assert names(found.shapes) == {""}
    assert "nodeserve profile --workers 2" in found.notes()[0]
    known = profile_of(MODEL, fixed_pool=True, sum_bytes_per_s=1e9)
    assert Shape(tp=2) in startable(known, 2, (1,), [knows_teams(known)]).shapes
    gpu = profile_of(MODEL)
    assert Shape(tp=2) in startable(gpu, 2, (1,), [knows_teams(gpu)]).shapes


def test_counts_of_experts_ask_for_ranks_that_share_them(tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    write_counts(path, facts_of(SPARSE), [[4.0, 3.0, 2.0, 1.0]] * SPARSE.num_layers)
    config = EngineConfig(expert_counts=str(path), redundant_experts=1)
    found = startable(profile_of(SPARSE), 4, (1,), [starts(config, SPARSE, CONTEXT)])
    assert found.shapes and all(shape.ep > 1 for shape in found.shapes)
