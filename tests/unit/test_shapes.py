"""What a shape costs by formula: against tables of what was measured, and what must hold."""

from dataclasses import replace
from statistics import fmean

import pytest

from nodeserve.config import ModelConfig, MoeConfig
from nodeserve.errors import ConfigError
from nodeserve.layout import Shape
from nodeserve.policy.cost import RankWork, StepCost
from nodeserve.policy.kernel_fits import FITS, MODELS
from nodeserve.policy.profile import Family, Profile
from nodeserve.policy.profiles import FAMILIES, PROFILES
from nodeserve.policy.sizes import anatomy_of

PREFILLS = [RankWork(n, n * n / 2) for n in (512, 1024, 2048, 4096, 8192)]
DECODES = [RankWork(0, 0.0, n, n * 1024) for n in (1, 8, 32, 64, 128, 256)]
ONE = PROFILES["llama-3.1-8b-h100"]


def seconds(profile: Profile, work: RankWork) -> float:
    return profile.cost.pass_s([work])


@pytest.mark.parametrize(("tp", "worst"), [(2, 0.13), (4, 0.26), (8, 0.47)])
def test_the_formula_is_near_the_tables(tp: int, worst: float) -> None:
    """Of every model that one GPU holds, from its passes on one GPU. docs/plan.md has these."""
    errors: dict[str, list[float]] = {"prefill": [], "decode": []}
    for name in FITS:
        family = FAMILIES[name]
        if (1, 1) not in family.shapes:
            continue
        alone = replace(family.of(Shape()), anatomy=MODELS[name.rpartition("-")[0]].anatomy)
        formula, table = alone.of(Shape(tp)), family.of(Shape(tp))
        for kind, works in (("prefill", PREFILLS), ("decode", DECODES)):
            for work in works:
                errors[kind].append(seconds(formula, work) / seconds(table, work) - 1.0)
    for kind, found in errors.items():
        assert abs(fmean(found)) < 0.1, (kind, fmean(found))
        assert max(map(abs, found)) < worst, (kind, min(found), max(found))


def test_tensor_ranks_are_faster_but_not_as_many_times_as_they_are() -> None:
    for work in (*PREFILLS[2:], *DECODES):
        times = [seconds(ONE.of(Shape(tp)), work) for tp in (1, 2, 4, 8)]
        assert times == sorted(times, reverse=True), work
        assert all(later > sooner / 2 for sooner, later in zip(times, times[1:], strict=False))


def test_stages_take_a_pass_no_faster() -> None:
    for work in (*PREFILLS, *DECODES):
        alone, staged = seconds(ONE, work), seconds(ONE.of(Shape(pp=2)), work)
        assert alone < staged < 1.05 * alone
    assert ONE.of(Shape(pp=4)).num_stages == 4


def test_memory_is_what_weights_leave_of_every_worker() -> None:
    weights, kv = 16.1e9, 131_072
    room = ONE.num_kv_tokens * kv
    assert ONE.of(Shape(2)).num_kv_tokens == pytest.approx(2 * (room + weights / 2) / kv, rel=1e-4)
    edges = 2 * 2 * 128_256 * 4096
    first = (weights - edges) / 2 + edges  # the first stage has the embedding and the head
    staged = 2 * (room + weights - first) / kv
    assert ONE.of(Shape(pp=2)).num_kv_tokens == pytest.approx(staged, rel=1e-4)
    copied = ONE.of(Shape(16))  # of 8 KV heads
    assert copied.kv_bytes_per_token == 2 * kv
    assert copied.num_kv_tokens == pytest.approx(8 * (room + weights * 15 / 16) / kv, rel=1e-4)


def test_links_of_all_workers_carry_a_handoff() -> None:
    assert ONE.of(Shape(2, 2)).handoff_bytes_per_s == 4 * ONE.handoff_bytes_per_s
    assert ONE.of(Shape(2, 2)).worker_kv_bytes(Shape(2, 2)) == ONE.kv_bytes_per_token / 4


def test_what_nobody_measured_says_so() -> None:
    assert "tp2 by formula, not measured" in ONE.of(Shape(2)).source
    assert ONE.of(Shape()) is ONE
    table = FAMILIES["llama-3.1-8b-bf16-h100"]
    assert "formula" not in table.of(Shape(2)).source


def test_a_whole_rank_has_no_other_shape() -> None:
    whole = PROFILES["llama-2-70b-tp8-h100"]
    with pytest.raises(ConfigError, match="whole rank.*says nothing of tp2.*epN"):
        whole.of(Shape(2))
    assert whole.of(Shape(ep=4)) is whole


def test_what_has_no_room_is_refused() -> None:
    tight = replace(ONE, num_kv_tokens=70_000)  # the first stage keeps embedding and head
    anatomy = tight.anatomy
    assert anatomy is not None
    heavy = replace(tight, num_kv_tokens=100, anatomy=replace(anatomy, weight_bytes=1e6))
    with pytest.raises(ConfigError, match="no worker has room for a request of 65536 tokens"):
        heavy.of(Shape(2))


# ---- ranks that share experts

SPARSE = ModelConfig(
    "mixtral", 32_000, 4096, 14_336, 32, 32, 8, 128, 32_768, 1e-5, 1e6,
    moe=MoeConfig(8, 2, 14_336),
)  # fmt: skip
MIXTRAL = Profile(
    "mixtral",
    "a test",
    StepCost(0.03, 0.03, 6e-5, 1e-9, 5e-5, 4.5e-8),
    noise=0.0,
    num_kv_tokens=300_000,
    kv_bytes_per_token=131_072,
    handoff_bytes_per_s=245e9,
    max_num_batched_tokens=8192,
    max_num_seqs=256,
    max_model_len=32_768,
    anatomy=anatomy_of(SPARSE),
)


def test_experts_are_read_and_kept_in_parts() -> None:
    shared = MIXTRAL.of(Shape(ep=4))
    assert shared.num_kv_tokens > 2 * MIXTRAL.num_kv_tokens
    idle = RankWork(0, 0.0, 1, 1024)
    assert shared.cost.pass_s([idle] * 4) < 0.6 * MIXTRAL.cost.pass_s([idle])


def test_a_pass_of_ranks_waits_for_the_slowest_and_shares_the_experts() -> None:
    cost = MIXTRAL.of(Shape(ep=4)).cost
    full, idle = RankWork(4096, 4096 * 2048), RankWork()
    level, slow = cost.pass_s([full] * 4), cost.pass_s([full, idle, idle, idle])
    assert slow > cost.pass_s([RankWork(1024, 1024 * 2048)] * 4), "the same number of tokens"
    assert slow < level, "their experts had less to do"
    alone = MIXTRAL.cost.pass_s([full])
    assert alone / 4 < slow < level < alone * 1.2


def test_what_tokens_send_to_experts_takes_the_links() -> None:
    slow_links = replace(MIXTRAL, handoff_bytes_per_s=MIXTRAL.handoff_bytes_per_s / 10)
    full = [RankWork(4096, 4096 * 2048)] * 4
    fast_s = MIXTRAL.of(Shape(ep=4)).cost.pass_s(full)
    row_s = 2 * 4096 / MIXTRAL.handoff_bytes_per_s
    sent_s = 4096 * 2 * 32 * 2 * 3 / 4 * row_s  # rows, both ways, layers, experts of a token
    found_s = slow_links.of(Shape(ep=4)).cost.pass_s(full) - fast_s
    assert found_s == pytest.approx(9 * sent_s)


def test_families_know_their_shapes_better() -> None:
    family = FAMILIES["deepseek-v3-fp8-h100"]
    assert isinstance(family, Family)
    assert "formula" not in family.of(Shape(ep=32)).source
