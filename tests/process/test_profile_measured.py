"""A profile measured on real worker processes whose passes take what is known: simulated ones."""

from dataclasses import replace
from pathlib import Path

import pytest

from nodeserve import profile_store
from nodeserve.checkpoint import resolve
from nodeserve.config import EngineConfig
from nodeserve.gpus import Gpus
from nodeserve.layout import Shape
from nodeserve.policy.cost import RankWork, StepCost
from nodeserve.policy.profiles import PROFILES
from nodeserve.policy.sizes import Anatomy
from nodeserve.profiling.measure import measure_profile

# Milliseconds, so that what a busy machine adds to a pass is little.
TRUE = replace(
    PROFILES["llama-3.1-8b-h100"],
    name="known",
    cost=StepCost(0.030, 0.020, 2e-4, 2e-7, 1e-3, 4e-6),
    noise=0.01,
    num_kv_tokens=4096,
    kv_bytes_per_token=1000,
    handoff_bytes_per_s=20e6,
    max_num_batched_tokens=64,
    max_num_seqs=16,
    max_model_len=512,
    # Layers and heads of the default model, with which it is measured; a row in two sums a layer
    # takes 0.6 of what its token does.
    anatomy=Anatomy(30, 3, row_bytes=30, weight_bytes=1e9),
)


@pytest.mark.slow
@pytest.mark.alone
def test_a_measured_profile_is_the_true_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODESERVE_PROFILES", str(tmp_path))
    profile_store.write(TRUE, {})
    said: list[str] = []
    result = measure_profile(
        EngineConfig(device="sim", profile="known"),
        resolve(None),
        Gpus(obstacle="none here"),
        2,
        "measured",
        lambda _: None,
        said.append,
    )
    found, true = result.profile, TRUE
    assert found.num_kv_tokens == true.num_kv_tokens
    assert found.kv_bytes_per_token == true.kv_bytes_per_token
    assert found.max_num_batched_tokens == true.max_num_batched_tokens
    # What lies between two passes is part of the fixed terms, and more on a busy machine.
    for name, share in (("prefill_fix_s", 0.3), ("decode_fix_s", 0.3), ("token_s", 0.1)):
        assert getattr(found.cost, name) == pytest.approx(getattr(true.cost, name), rel=share), name
    for errors in (result.prefill, result.decode, result.handoff, result.team):
        assert errors is not None
        assert errors.mean < 0.05
        assert errors.num_groups >= 3
    assert found.handoff_bytes_per_s == pytest.approx(true.handoff_bytes_per_s, rel=0.1)
    # What simulated teams tell each other goes over links, and takes as long whatever it is called.
    for work in (RankWork(64, 2048), RankWork(0, 0.0, 8, 800)):
        team_s = found.of(Shape(tp=2)).cost.pass_s([work])
        assert team_s == pytest.approx(true.of(Shape(tp=2)).cost.pass_s([work]), rel=0.15)
    assert result.slowdown == pytest.approx(1.0, abs=0.1)  # simulated workers share nothing
    assert any("handoff" in text for text in said)
