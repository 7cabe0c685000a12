"""Cost models fitted to passes whose true cost is known."""

from dataclasses import replace
from random import Random

import pytest

from nodeserve.errors import ConfigError
from nodeserve.plan.fit import Timed, errors_of, fit_cost, slowdown_of, spread_of
from nodeserve.policy.cost import RankWork, StepCost

TRUE = StepCost(0.008, 0.005, 1e-4, 2e-8, 3e-4, 5e-7)


def passes(cost: StepCost, noise: float = 0.0, seed: int = 0) -> list[Timed]:
    random = Random(seed)
    works = [
        RankWork(0, 0.0, batch, batch * context)
        for batch in (1, 2, 4, 8, 16, 32, 64)
        for context in (16, 64, 256, 1024)
    ]
    works += [
        RankWork(tokens, tokens * (context + tokens / 2), batch, batch * 100)
        for tokens in (1, 16, 64, 128, 256)
        for context in (0, 512, 1024)
        for batch in (0, 3)
    ]
    return [
        Timed(work, cost.pass_s([work]) * random.gauss(1.0, noise), str(place))
        for place, work in enumerate(works)
    ]


def assert_near(found: StepCost, true: StepCost, share: float) -> None:
    for name in ("prefill_fix_s", "decode_fix_s", "token_s", "attention_s", "decode_seq_s"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=share), name


def test_exact_passes_give_the_exact_cost() -> None:
    found = fit_cost(passes(TRUE))
    assert_near(found, TRUE, 1e-6)
    assert found.kv_token_s == pytest.approx(TRUE.kv_token_s)
    assert found.floor is None
    errors = errors_of(passes(TRUE), found)
    assert errors is not None and errors.worst < 1e-6


def test_noise_averages_out_and_is_reported() -> None:
    many = [one for seed in range(20) for one in passes(TRUE, 0.03, seed)]
    found = fit_cost(many)
    assert_near(found, TRUE, 0.1)
    assert spread_of(many, found) == pytest.approx(0.03, rel=0.25)


def test_passes_that_something_held_up_do_not_count() -> None:
    held_up = [
        one._replace(seconds=20 * one.seconds) if place % 9 == 4 else one
        for place, one in enumerate(passes(TRUE, 0.01))
    ]
    assert_near(fit_cost(held_up), TRUE, 0.15)


def test_few_tokens_may_take_the_time_of_a_floor() -> None:
    """As where weights are read from memory, until arithmetic takes longer."""
    bent = StepCost(
        *(0.003, 0.001, 1e-3, 2e-8, 1.4e-3, 1e-6),
        floor=StepCost(0.013, 0.009, 0.0, 0.0, 3e-4, 1e-6),
    )
    found = fit_cost(passes(bent))
    assert found.floor is not None
    assert found.floor.decode_fix_s == pytest.approx(0.009, rel=0.02)
    assert found.floor.prefill_fix_s == pytest.approx(0.013, rel=0.02)
    assert found.token_s == pytest.approx(1e-3, rel=0.02)
    assert found.decode_seq_s == pytest.approx(1.4e-3, rel=0.02)
    errors = errors_of(passes(bent), found)
    assert errors is not None and errors.mean < 0.01
    alone = errors_of(passes(bent), replace(found, floor=None))
    assert alone is not None and alone.mean > 0.1  # the floor is what makes it right


def test_gaps_between_passes_belong_to_them() -> None:
    found = fit_cost(passes(TRUE), gap_s=0.001)
    assert found.decode_fix_s == pytest.approx(TRUE.decode_fix_s + 0.001)
    assert found.prefill_fix_s == pytest.approx(TRUE.prefill_fix_s + 0.001)
    errors = errors_of(passes(TRUE), found, gap_s=0.001)
    assert errors is not None and errors.mean < 1e-6


def test_errors_are_those_of_a_wrong_model() -> None:
    wrong = StepCost(0.0088, 0.0055, 1.1e-4, 2.2e-8, 3.3e-4, 5.5e-7)
    errors = errors_of(passes(TRUE), wrong)
    assert errors is not None
    assert errors.mean == pytest.approx(0.1)
    assert errors.num_groups == len(passes(TRUE))
    assert errors_of([], wrong) is None


def test_what_service_takes_longer_is_in_every_term() -> None:
    """Also where another line holds, for few tokens and for large batches."""
    bent = replace(
        TRUE,
        floor=replace(TRUE, decode_fix_s=0.01),
        large=replace(TRUE, token_s=2e-4),
        large_seqs=32,
    )
    served = [one._replace(seconds=1.08 * one.seconds) for one in passes(bent)]
    slowdown = slowdown_of(served, bent)
    assert slowdown == pytest.approx(1.08) and slowdown_of([], bent) == 1.0
    errors = errors_of(served, bent.times(slowdown))
    assert errors is not None and errors.worst < 1e-6
    gap_s = 0.001
    assert slowdown_of(passes(TRUE), fit_cost(passes(TRUE), gap_s), gap_s) == pytest.approx(1.0)


def test_no_coefficient_is_negative() -> None:
    """A second of prefill falls with context here, which no cost may say."""
    odd = [
        one._replace(seconds=one.seconds * (0.5 if one.work.attention > 5e4 else 1.0))
        for one in passes(TRUE)
    ]
    found = fit_cost(odd)
    assert min(found.attention_s, found.token_s, found.prefill_fix_s) >= 0.0


def test_too_few_passes_are_refused() -> None:
    with pytest.raises(ConfigError, match="decode passes were measured"):
        fit_cost([one for one in passes(TRUE) if one.work.prefill_tokens])
