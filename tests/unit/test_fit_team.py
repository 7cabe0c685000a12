"""What tensor ranks tell each other, from passes that are longer than halves of one worker's."""

from dataclasses import replace

import pytest

from nodeserve.errors import ConfigError
from nodeserve.layout import Shape
from nodeserve.plan.fit import Timed, errors_of
from nodeserve.plan.fit_team import PAIR, fit_team
from nodeserve.policy.cost import RankWork, StepCost
from nodeserve.policy.profile import Profile
from nodeserve.policy.profiles import PROFILES
from nodeserve.policy.sizes import Anatomy

HOP_S, RATE = 3e-6, 2e9
ANATOMY = Anatomy(30, 3, 4 * 576, 270e6, fixed_pool=True)
ONE = replace(
    PROFILES["llama-3.1-8b-h100"],
    cost=StepCost(0.010, 0.008, 2e-4, 2e-8, 3e-4, 5e-7, floor=StepCost(0.012, 0.012, 0, 0, 0, 0)),
    anatomy=ANATOMY,
)
WORKS = [RankWork(0, 0.0, batch, batch * n) for batch in (1, 4, 16, 64) for n in (16, 1024)]
WORKS += [RankWork(tokens, tokens * tokens / 2) for tokens in (4, 32, 128, 512)]


def team_of(profile: Profile, hop_s: float, rate: float) -> Profile:
    anatomy = replace(ANATOMY, hop_s=hop_s, sum_bytes_per_s=rate)
    return replace(profile, anatomy=anatomy)


def passes(profile: Profile, gap_s: float = 0.0) -> list[Timed]:
    """Three alike each, one of them held up."""
    cost = profile.of(PAIR).cost
    return [
        Timed(work, factor * cost.pass_s([work]) - gap_s, f"{work}")
        for work in WORKS
        for factor in (1.0, 1.0, 5.0)
    ]


@pytest.mark.parametrize("gap_s", [0.0, 1e-3])
def test_both_terms_are_found(gap_s: float) -> None:
    true = team_of(ONE, HOP_S, RATE)
    found = fit_team(ONE, passes(true, gap_s), gap_s)
    assert found.hop_s == pytest.approx(HOP_S, rel=1e-6)
    assert found.sum_bytes_per_s == pytest.approx(RATE, rel=1e-6)
    assert replace(found, hop_s=0.0, sum_bytes_per_s=0.0) == replace(ANATOMY, hop_s=0.0)
    errors = errors_of(passes(true, gap_s), replace(ONE, anatomy=found).of(PAIR).cost, gap_s)
    assert errors is not None and errors.worst < 1e-6


def test_a_term_that_would_be_negative_is_none() -> None:
    faster = replace(ONE, cost=replace(ONE.cost, token_s=1.8e-4, decode_seq_s=2.7e-4))
    found = fit_team(ONE, passes(team_of(faster, 10 * HOP_S, 1e18)))
    assert found.hop_s > 0.0 and found.sum_bytes_per_s >= 1e17
    floor = StepCost(0.011, 0.011, 0, 0, 0, 0)
    shorter = replace(ONE, cost=replace(ONE.cost, decode_fix_s=0.007, floor=floor))
    found = fit_team(ONE, passes(team_of(shorter, 0.0, RATE / 5)))
    assert found.hop_s == 0.0 and found.sum_bytes_per_s < 1e17


def test_without_passes_nothing_is_known() -> None:
    with pytest.raises(ConfigError, match="no pass of two workers"):
        fit_team(ONE, [])


def test_sums_in_shared_memory_grow_with_the_workers() -> None:
    """Each writes its rows and reads all: three parts with two workers, nine with eight."""
    profile = replace(
        team_of(ONE, 0.0, RATE),
        anatomy=replace(ANATOMY, num_kv_heads=8, hop_s=0.0, sum_bytes_per_s=RATE),
    )
    row_s = 2 * ANATOMY.num_layers * ANATOMY.row_bytes / RATE
    for tp, parts in ((2, 1.0), (8, 3.0)):
        cost = profile.of(Shape(tp)).cost
        assert cost.token_s - ONE.cost.token_s / tp == pytest.approx(parts * row_s)
