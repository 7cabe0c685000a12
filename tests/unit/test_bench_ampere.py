"""Llama 3.1 on A100: the shipped terms against the tables that they are fitted to, at sizes that
they are not fitted to, and against passes that were measured."""

import pytest

from bench.ampere import fit, kernels
from bench.hopper import kernels as hopper
from nodeserve.errors import ConfigError
from nodeserve.policy.cost import RankWork
from nodeserve.policy.kernel_fits import FITS, LARGE_SEQS, MAX_MODEL_LEN
from nodeserve.policy.profiles import FAMILIES, find_profile

MISSING = kernels.missing() or hopper.missing()
NEEDS_DATA = pytest.mark.skipif(MISSING is not None, reason=f"{MISSING} is not here")
SHAPES = [(name, tp) for name in kernels.NAMES for tp in (1, 2, 4, 8)]


@NEEDS_DATA
@pytest.mark.parametrize(("name", "tp"), SHAPES)
def test_terms_are_those_of_the_tables_and_hold_between_their_sizes(name: str, tp: int) -> None:
    found, shipped = fit.fit(name, tp), FITS[f"{name}-bf16-a100"][tp]
    assert shipped.prefill == pytest.approx(found.prefill, rel=1e-3)
    assert shipped.small == pytest.approx(found.decode.small, rel=1e-3)
    assert shipped.large == pytest.approx(found.decode.large, rel=1e-3)
    held = fit.held_out(name, tp)
    assert max(held.prefill[0], held.decode[0]) < 0.043
    assert found.error < 0.09


@NEEDS_DATA
def test_prefills_on_two_gpus_are_those_that_were_measured() -> None:
    """Nothing was fitted to them; with more GPUs that engine mostly waited to start kernels."""
    pairs = [one.prefill_ms for one in fit.measured() if one.tp == 2]
    assert len(pairs) == 5
    assert all(abs(ours / theirs - 1) < 0.06 for theirs, ours in pairs)


@NEEDS_DATA
def test_a_layer_is_interpolated_and_goes_on_in_proportion() -> None:
    model = hopper.MODELS["llama-3.1-8b"]
    four, six, eight = (
        kernels.prefill_ms("llama-3.1-8b", model, 1, size) for size in (4096, 6144, 8192)
    )
    assert four < six < eight < 2.2 * four
    assert kernels.decode_ms("llama-3.1-8b", model, 1, 1, 8192) > kernels.decode_ms(
        "llama-3.1-8b", model, 1, 1, 256
    )


@pytest.mark.parametrize(
    ("name", "least_gpus"), [("llama-3.1-8b-bf16-a100", 1), ("llama-3.1-70b-bf16-a100", 4)]
)
def test_the_profiles_can_be_planned_with(name: str, least_gpus: int) -> None:
    family = find_profile(name)
    assert family is FAMILIES[name]
    assert min(one.num_gpus for one in FAMILIES[name].shapes.values()) == least_gpus
    assert all(
        one.num_kv_tokens >= 2 * one.num_stages * MAX_MODEL_LEN
        for one in FAMILIES[name].shapes.values()
    )


def test_steps_of_more_sequences_than_a_small_kernel_takes_have_their_own_terms() -> None:
    cost, fit = FAMILIES["llama-3.1-8b-bf16-a100"].shapes[1, 1].cost, FITS["llama-3.1-8b-bf16-a100"]
    for num_seqs, terms in ((LARGE_SEQS - 1, fit[1].small), (LARGE_SEQS, fit[1].large)):
        wanted_ms = terms[0] + terms[1] * 50_000 + terms[2] * num_seqs
        work = RankWork(num_decodes=num_seqs, kv_tokens=50_000)
        assert 1e3 * cost.pass_s([work]) == pytest.approx(wanted_ms)
        assert cost.pass_s([work, RankWork()]) == cost.pass_s([work])


def test_a100_is_slower_than_h100() -> None:
    old, new = (FAMILIES[f"llama-3.1-8b-bf16-{gpu}"].shapes[1, 1].cost for gpu in ("a100", "h100"))
    for work in (RankWork(2048, 2048**2 / 2), RankWork(num_decodes=32, kv_tokens=65_536)):
        assert 1.5 < old.pass_s([work]) / new.pass_s([work]) < 4.0


def test_who_asks_for_a_profile_there_is_not_is_told_of_them() -> None:
    with pytest.raises(ConfigError, match="llama-3.1-70b-bf16-a100"):
        find_profile("llama-3.1-70b-a100")
