"""What a pass takes, learned from passes whose law is known."""

import math
from collections.abc import Callable
from random import Random
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodeserve.policy.cost import IDLE, RankWork, StepCost
from nodeserve.policy.pass_times import CHANGED, CUT, LONGEST_S, PassTimes

COST = StepCost(0.060, 0.020, 1e-4, 6e-9, 5e-5, 5e-8, 3e-5)
Pass = tuple[RankWork, ...]


def prefill_pass(rng: Random, num_ranks: int = 8) -> Pass:
    chunks = [rng.choice((4096, rng.randrange(1, 4096))) for _ in range(num_ranks)]
    contexts = [rng.choice((0, 0, 4096, 8192)) for _ in chunks]
    return tuple(RankWork(n, n * (c + n / 2)) for n, c in zip(chunks, contexts, strict=True))


def decode_pass(rng: Random, num_ranks: int = 8) -> Pass:
    counts = [rng.randrange(1, 200) for _ in range(num_ranks)]
    return tuple(RankWork(0, 0.0, count, count * rng.randrange(200, 3000)) for count in counts)


def mixed_pass(rng: Random, num_ranks: int = 8) -> Pass:
    both = zip(prefill_pass(rng, num_ranks), decode_pass(rng, num_ranks), strict=True)
    return tuple(RankWork(*prefill[:2], *decode[2:]) for prefill, decode in both)


MAKERS: dict[str, Callable[[Random, int], Pass]] = {
    "prefill": prefill_pass,
    "decode": decode_pass,
    "mixed": mixed_pass,
}


def watch(
    times: PassTimes, rng: Random, num: int, cost: StepCost = COST, slower: float = 1
) -> None:
    """Prefill passes with 3 % of noise."""
    for _ in range(num):
        ranks = prefill_pass(rng)
        times.observe(ranks, slower * cost.pass_s(ranks) * rng.gauss(1, 0.03))


def mean_error(times: PassTimes, make: Callable[[], Pass], cost: StepCost = COST) -> float:
    """Mean share by which passes that were not observed are predicted wrong."""
    held_out = [make() for _ in range(100)]
    errors = []
    for ranks in held_out:
        predicted_s, true_s = times.predict_s(ranks), cost.pass_s(ranks)
        assert predicted_s is not None
        errors.append(abs(predicted_s - true_s) / true_s)
    return fmean(errors)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("num_ranks", [1, 8])
@pytest.mark.parametrize("seed", range(4))
def test_fifty_noisy_passes_show_the_law(kind: str, num_ranks: int, seed: int) -> None:
    rng = Random(seed)
    cost = StepCost(
        prefill_fix_s=10 ** rng.uniform(-2.5, -1),
        decode_fix_s=10 ** rng.uniform(-2.5, -1.5),
        token_s=10 ** rng.uniform(-5, -4),
        attention_s=10 ** rng.uniform(-9, -8),
        decode_seq_s=10 ** rng.uniform(-5, -4),
        kv_token_s=10 ** rng.uniform(-8, -7),
        expert_token_s=10 ** rng.uniform(-5.5, -4.5) if num_ranks > 1 else 0.0,
    )
    times = PassTimes()
    for _ in range(50):
        ranks = MAKERS[kind](rng, num_ranks)
        times.observe(ranks, cost.pass_s(ranks) * rng.gauss(1, 0.03))
    assert mean_error(times, lambda: MAKERS[kind](rng, num_ranks), cost) < 0.05


def test_prefill_and_pure_decode_passes_are_told_apart() -> None:
    rng, times = Random(1), PassTimes()
    for _ in range(60):
        for ranks in (prefill_pass(rng), decode_pass(rng)):
            times.observe(ranks, COST.pass_s(ranks))
    assert mean_error(times, lambda: prefill_pass(rng)) < 0.03
    assert mean_error(times, lambda: decode_pass(rng)) < 0.03


def test_before_any_pass_nothing_is_known() -> None:
    times = PassTimes()
    assert times.mean_s is None and times.predict_s([IDLE]) is None
    assert times.decode_costs(1) is None


def test_until_three_passes_of_a_kind_the_mean_is_the_prediction() -> None:
    times = PassTimes()
    small, large = [RankWork(100, 5000.0)], [RankWork(4096, 4096**2 / 2)]
    times.observe(small, 0.1)
    times.observe(large, 0.3)
    assert times.predict_s(small) == times.predict_s(large) == times.mean_s == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("seconds", "mean_s"),
    [
        ([1.0], 1.0),
        ([1.0, 2.0], 1.5),
        ([1.0, 1.0, 1.0, 100.0], (3 + CUT) / 4),
        ([100.0, 1.0, 1.0, 1.0], (3 + CUT) / 4),  # the first pass compiles
        ([1.0, 1.0, 1.0, 0.0], (3 + 1 / CUT) / 4),
        ([1.0, math.nan, math.inf, 1e300, -1.0], 1.0),
        ([9.0, 1.0, 1.0, 1.0, 1.0], 1.0),  # the oldest of five is forgotten
    ],
)
def test_the_mean_of_the_last_four_cuts_outliers(seconds: list[float], mean_s: float) -> None:
    times = PassTimes(num_history=4)
    for one in seconds:
        times.observe([IDLE], one)
    assert times.mean_s == pytest.approx(mean_s)


def test_equal_passes_predict_themselves_and_little_else() -> None:
    rng, times = Random(2), PassTimes()
    ranks = prefill_pass(rng)
    for _ in range(300):
        times.observe(ranks, COST.pass_s(ranks) * rng.gauss(1, 0.03))
    assert times.predict_s(ranks) == pytest.approx(COST.pass_s(ranks), rel=0.02)
    other_s = times.predict_s([RankWork(1, 0.5)] * 8)
    assert other_s is not None and 0.2 * COST.prefill_fix_s < other_s < 1.1 * COST.pass_s(ranks)
    watch(times, rng, 60)
    assert mean_error(times, lambda: prefill_pass(rng)) < 0.05


@pytest.mark.parametrize("seed", range(5))
def test_noise_on_passes_that_hardly_differ_is_not_taken_for_a_law(seed: int) -> None:
    rng, times = Random(seed), PassTimes()
    for _ in range(60):
        ranks = [RankWork(n, n * n / 2) for n in (rng.randrange(4090, 4097) for _ in range(8))]
        times.observe(ranks, COST.pass_s(ranks) * rng.gauss(1, 0.1))
    half_s, mean_s = times.predict_s([RankWork(2048, 2048**2 / 2)] * 8), times.mean_s
    assert half_s is not None and mean_s is not None
    assert 0.5 * mean_s < half_s < 1.1 * mean_s


def test_the_experts_work_is_that_of_all_ranks() -> None:
    rng, times = Random(7), PassTimes()
    cost = StepCost(0.01, 0.01, 1e-5, 0.0, 0.0, 0.0, expert_token_s=1e-4)

    def make() -> Pass:
        """The slowest rank is always full, the others are not."""
        return (RankWork(4096), *(RankWork(rng.randrange(4096)) for _ in range(7)))

    for _ in range(50):
        ranks = make()
        times.observe(ranks, cost.pass_s(ranks))
    assert mean_error(times, make, cost) < 0.02


@pytest.mark.parametrize("num_outliers", [1, 4])
def test_outliers_do_not_spoil_what_was_learned(num_outliers: int) -> None:
    rng, times = Random(3), PassTimes()
    watch(times, rng, 60)
    for _ in range(num_outliers):
        times.observe(prefill_pass(rng), 30.0)
    assert mean_error(times, lambda: prefill_pass(rng)) < 0.05


def test_a_first_pass_that_compiles_is_no_measure() -> None:
    rng, times = Random(4), PassTimes()
    times.observe(prefill_pass(rng), 30.0)
    watch(times, rng, 5)
    assert mean_error(times, lambda: prefill_pass(rng)) < 0.25
    watch(times, rng, 35)
    assert mean_error(times, lambda: prefill_pass(rng)) < 0.05


@pytest.mark.parametrize("slower", [0.3, 1.3, 3.0, 10.0])
def test_a_lasting_change_is_learned(slower: float) -> None:
    """Outliers are cut; so many in a row that nothing but them is seen are the new law."""
    rng, times = Random(5), PassTimes()
    watch(times, rng, 100)
    watch(times, rng, CHANGED + 120, slower=slower)
    ranks = prefill_pass(rng)
    assert times.predict_s(ranks) == pytest.approx(slower * COST.pass_s(ranks), rel=0.08)


def test_what_a_sequence_and_a_token_cost_a_decode_step() -> None:
    rng, times = Random(6), PassTimes()
    for num in range(400):
        assert times.decode_costs(400) is None, num
        ranks = decode_pass(rng)
        times.observe(ranks, COST.pass_s(ranks) * rng.gauss(1, 0.03))
    costs = times.decode_costs(400)
    assert costs is not None
    # A rank that is slowest has many sequences as a rule, so the experts' share is partly its own.
    assert COST.decode_seq_s * 0.8 < costs[0] < (COST.decode_seq_s + COST.expert_token_s) * 1.1
    assert costs[1] == pytest.approx(COST.kv_token_s, rel=0.1)


works = st.builds(
    RankWork,
    st.integers(0, 1 << 20),
    st.floats(0, 1e14),
    st.integers(0, 4096),
    st.integers(0, 1 << 30),
)
passes = st.tuples(st.lists(works, min_size=1, max_size=4), st.floats())


@settings(deadline=None, max_examples=100)
@given(st.lists(passes, max_size=40), st.lists(works, min_size=1, max_size=4))
def test_predictions_stay_near_what_was_seen(
    seen: list[tuple[list[RankWork], float]], asked: list[RankWork]
) -> None:
    times = PassTimes()
    valid: list[float] = []
    for ranks, seconds in seen:
        times.observe(ranks, seconds)
        if 0 <= seconds < LONGEST_S:
            valid.append(seconds)
        if valid:
            for answer_s in (times.predict_s(asked), times.mean_s):
                assert answer_s is not None
                assert min(valid) / CUT <= answer_s <= CUT * max(valid)
