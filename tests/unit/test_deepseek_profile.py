"""DeepSeek-V3's simulated passes against published rates, and what its ranks hold."""

from dataclasses import replace

import pytest

from nodeserve.config import ModelConfig
from nodeserve.errors import ConfigError
from nodeserve.layout import Shape
from nodeserve.plan.candidates import kinds_of
from nodeserve.policy.cost import RankWork
from nodeserve.policy.deepseek import V3
from nodeserve.policy.profile import Family, Profile
from nodeserve.policy.profiles import find_profile
from nodeserve.policy.sizes import anatomy_of

LLAMA_70B = ModelConfig("llama", 128_256, 8192, 28_672, 80, 64, 8, 128, 8192, 1e-5, 5e5)


def family_of(gpu: str) -> Family:
    found = find_profile(f"deepseek-v3-fp8-{gpu}")
    assert isinstance(found, Family)
    return found


def h100(ranks: int) -> Profile:
    return family_of("h100").of(Shape(ep=ranks))


@pytest.mark.parametrize(("prompt", "published"), [(4096, 50_302), (2000, 52_300)])
def test_prefill_tokens_per_second_of_a_node(prompt: int, published: int) -> None:
    tokens = 8192
    full = [RankWork(tokens, tokens * prompt / 2)] * 32
    rate = 8 * tokens / h100(32).cost.pass_s(full)
    assert rate == pytest.approx(published, rel=0.05)


def test_decode_tokens_per_second_of_a_node() -> None:
    full = [RankWork(num_decodes=256, kv_tokens=256 * 2100)] * 72
    assert 8 * 256 / h100(72).cost.pass_s(full) == pytest.approx(22_300, rel=0.05)


def test_a_rank_without_work_waits_for_the_others() -> None:
    cost, idle = h100(32).cost, [RankWork()] * 31
    alone = cost.pass_s([RankWork(8192, 8192 * 750), *idle])
    shared = cost.pass_s([RankWork(256, 256 * 750)] * 32)
    assert alone > 4 * shared  # the same number of tokens


def test_ranks_hold_their_share_of_the_experts() -> None:
    """671 billion weights, 654 of them in experts."""
    assert V3.num_routed_weights == 58 * 256 * 3 * 7168 * 2048
    assert anatomy_of(V3, value_bytes=1).worker_weight_bytes(Shape(ep=32)) == pytest.approx(
        17.1e9 + 654e9 / 32, rel=0.01
    )
    assert anatomy_of(V3, value_bytes=1).worker_weight_bytes(Shape(tp=8)) == pytest.approx(
        671e9 / 8, rel=0.01
    )
    assert anatomy_of(LLAMA_70B, value_bytes=1).worker_weight_bytes(Shape(tp=8)) == pytest.approx(
        70.5e9 / 8, rel=0.01
    )


def test_eight_h100_do_not_hold_the_model_and_eight_h200_do() -> None:
    with pytest.raises(ConfigError, match="has no .*use one of ep16, ep32"):
        h100(8)
    assert family_of("h200").of(Shape(ep=8)).num_kv_tokens > 100_000
    assert h100(72).num_kv_tokens > h100(16).num_kv_tokens
    with pytest.raises(ConfigError, match="use one of"):
        family_of("h200").of(Shape(tp=2))


def test_a_planner_tries_the_ranks_that_the_family_knows() -> None:
    kinds = kinds_of(family_of("h100"), 64, eps=(1, 2))
    assert [(kind.shape.ep, kind.num_gpus) for kind in kinds] == [(16, 16), (32, 32), (64, 64)]
    with pytest.raises(ConfigError, match="needs 16 GPUs or more, 8 given"):
        kinds_of(family_of("h100"), 8)
    with pytest.raises(ConfigError, match="none of the shapes asked for: it has ep16, ep32"):
        kinds_of(family_of("h100"), 64, shapes=[Shape()])


def test_latents_are_on_every_tensor_rank_and_heads_are_split() -> None:
    latents, heads = anatomy_of(V3), anatomy_of(LLAMA_70B)
    assert latents.worker_kv_share(Shape()) == latents.worker_kv_share(Shape(tp=8)) == 1.0
    assert latents.worker_kv_share(Shape(pp=2)) == 31 / 61
    assert heads.worker_kv_share(Shape(tp=4)) == 1 / 4
    few = anatomy_of(replace(LLAMA_70B, num_kv_heads=2))
    assert few.worker_kv_share(Shape(tp=4)) == 1 / 2


def test_the_first_stage_has_the_embedding_and_the_head() -> None:
    whole = anatomy_of(LLAMA_70B, value_bytes=1)
    edges = 2 * 128_256 * 8192
    inner = whole.weight_bytes - edges
    assert whole.worker_weight_bytes(Shape(pp=2)) == pytest.approx(inner / 2 + edges)
    assert whole.worker_weight_bytes(Shape(tp=4, pp=2)) == pytest.approx((inner / 2 + edges) / 4)
