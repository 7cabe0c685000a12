"""The parts of the reproduction that decide: attainment, scale, the search, one phase alone; and
what was fitted on Hopper GPUs against the tables it is fitted to."""

from collections import Counter
from itertools import permutations

import pytest

from bench.distserve import ablation, endtoend, figures, page, tasks, validate
from bench.distserve.cases import CASES, DISAGGREGATED, PREFILL_FIRST, Arm, Case
from bench.distserve.data import lengths, missing
from bench.distserve.phases import phase_rate
from bench.distserve.runs import (
    Load,
    Protocol,
    Times,
    arrivals,
    at_most,
    counted,
    highest_rate,
    serve,
    smallest,
    tally,
)
from bench.distserve.tables import Row, ablation_rows, lines_of
from bench.distserve.tasks import Ask
from bench.hopper import fit, kernels
from nodeserve.layout import Shape, parse_layout
from nodeserve.plan.goodput import GOAL, Slo, Tally
from nodeserve.policy.kernel_fits import FITS
from nodeserve.types import Role

LIMITS = Slo(1.0, 0.1)
NEEDS_DATA = pytest.mark.skipif(
    missing() is not None, reason=f"{missing()} is not here: set NODESERVE_DATA"
)


def test_both_limits_count_together_and_refused_ones_miss() -> None:
    run = [Times(0.5, 0.05), Times(0.5, 0.2), Times(2.0, 0.05), Times(None, None)]
    assert tally(run, LIMITS) == Tally(4, 1)
    assert tally(run, Slo(ttft_s=1.0)) == Tally(4, 2)
    assert smallest(run, LIMITS) is None
    assert smallest(run[:3], LIMITS) == 2.0


@pytest.mark.parametrize("true_rate", [0.07, 0.9, 1.0, 7.3])
def test_the_search_finds_the_last_rate_that_passes(true_rate: float) -> None:
    asked: list[float] = []

    def ask(rate: float) -> Tally:
        asked.append(rate)
        return Tally(20, 19 if rate <= true_rate else 10)

    found = highest_rate(ask, 1.0)
    assert found <= true_rate < found * 1.031
    assert len(asked) == len(set(asked))
    assert highest_rate(ask, 1.0, true_rate * 1.01) == 0.0
    assert asked[-1] == true_rate * 1.01  # and no other
    found = highest_rate(ask, 1.0, true_rate * 0.9)
    assert found <= true_rate < found * 1.031


def test_a_rate_that_nothing_attains_is_none() -> None:
    assert highest_rate(lambda rate: Tally(1, 0), 1.0) == 0.0


def test_a_race_finds_what_a_search_of_every_shape_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever cannot win is asked once; who would be late alone, never."""
    rates = {"1m": 1.5, "1m:tp2": 2.0, "1m:tp4": 1.9}
    asks = [
        Ask(
            Load(Arm(PREFILL_FIRST, "opt-13b-a100", layout, 16384), "512+64", Protocol(())),
            LIMITS,
            1.0,
        )
        for layout in rates
    ]
    asked: list[tuple[str, float]] = []

    def at_most(load: Load, rate: float, limits: Slo) -> Tally:
        asked.append((load.arm.layout, rate))
        return Tally(10, 9 if rate <= rates[load.arm.layout] else 0)

    monkeypatch.setattr(tasks, "at_most", at_most)
    for order in permutations(asks):
        asked.clear()
        found = tasks.race(order)
        assert found.arm.layout == "1m:tp2" and found.rate <= 2.0 < 1.031 * found.rate
        num_asked = Counter(layout for layout, _ in asked)
        assert set(num_asked) == set(rates) and min(num_asked.values()) == 1
    asked.clear()
    assert tasks.race([ask._replace(limits=Slo(0.05)) for ask in asks[:1]]).rate == 0.0
    assert not asked


@pytest.mark.parametrize("warm_up_s", [0.0, 2.0])
def test_a_run_that_fails_ends_early_and_one_that_does_not_is_whole(warm_up_s: float) -> None:
    """The verdict is that of whole runs, rate by rate."""
    arm, limits = Arm(PREFILL_FIRST, "opt-13b-a100", "1m", 16384), Slo(0.4, 0.04)
    load = Load(arm, "512+64", Protocol((0, 1), 50, warm_up_s=warm_up_s))
    verdicts = []
    for rate in (1.0, 3.5, 12.0):
        whole, early = tally(counted(load, rate), limits), at_most(load, rate, limits)
        assert early.num_offered == whole.num_offered > 0
        verdicts.append(whole.share >= GOAL)
        assert (early.share >= GOAL) is verdicts[-1]
        assert whole.share <= early.share
    assert True in verdicts and False in verdicts
    assert early.num_good > whole.num_good  # the last one


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("way", endtoend.SEARCHED)
@pytest.mark.parametrize("kernels", endtoend.KERNELS.values())
def test_a_baselines_shapes_hold_the_model_and_have_the_papers_among_them(
    case: Case, way: str, kernels: str
) -> None:
    arms = tasks.candidates(case, way, kernels)
    assert len(set(arms)) == len(arms) and max(arm.num_gpus for arm in arms) <= 12
    theirs = case.arm(way)
    layouts = {str(parse_layout(arm.layout)) for arm in arms if arm.budget == theirs.budget}
    assert str(parse_layout(theirs.layout)) in layouts
    units = tasks.candidates(case, DISAGGREGATED, kernels)
    ours = case.arm(DISAGGREGATED)
    assert max(unit.num_gpus for unit in units) <= max(case.model.most_gpus, ours.num_gpus)
    if kernels == "":
        assert str(parse_layout(ours.layout)) in {str(parse_layout(one.layout)) for one in units}


def test_arrivals_have_their_rate_exactly_and_agree_across_rates() -> None:
    slow, fast = arrivals("512+64", 2.0, 100, 0), arrivals("512+64", 4.0, 100, 0)
    assert slow[-1].arrived_s == pytest.approx(50.0)
    assert [2 * one.arrived_s for one in fast] == pytest.approx([one.arrived_s for one in slow])
    assert slow != arrivals("512+64", 2.0, 100, 1)
    assert {one[1:3] for one in slow} == {(512, 64)}


def test_the_papers_units_have_the_papers_gpus() -> None:
    gpus = {case.name: case.arm(DISAGGREGATED).num_gpus for case in CASES}
    assert list(gpus.values()) == [3, 8, 21, 8, 8]
    assert [case.arm(PREFILL_FIRST).num_gpus for case in CASES] == [1, 4, 8, 4, 4]


def test_no_pass_of_the_free_phase_costs_anything() -> None:
    """Decoding alone at batch 1 is as fast as the profile; its rate is far above both phases'."""
    protocol = Protocol((0,), 40)
    args = ("opt-13b-a100", Role.DECODE, Shape(), "512+64", Slo(0.4, 0.04), protocol, 4.0)
    both = Arm(DISAGGREGATED, "opt-13b-a100", "1p1d", 8192)
    assert phase_rate(*args) > 6.0
    assert tally(serve(both, arrivals("512+64", 1.0, 40, 0)), Slo(0.4, 0.04)).share == 1.0


def test_the_table_leaves_out_what_there_is_not() -> None:
    lines = lines_of([Row("a", 2.0, 1.0), Row("b", None, 1.0), Row("c", 2.0, None)])
    assert "-50%" in lines[1]
    assert "%" not in lines[2] + lines[3]


def test_one_run_is_judged_by_limits_of_every_scale() -> None:
    load = Load(Arm(PREFILL_FIRST, "opt-13b-a100", "1m", 16384), "512+64", Protocol((0,), 60))
    ask = Ask(load, Slo(0.4, 0.04), 0.0)
    found = tasks.scaled_at((ask, 2.0, (2.0, 1.0, 0.5)))
    for share, scale in zip(found.shares, (2.0, 1.0, 0.5), strict=True):
        assert share == tasks.share_at((ask._replace(limits=ask.limits.scaled(scale)), 2.0))
    assert found.shares[0] > found.shares[2]
    assert found.smallest == tasks.scale_at((ask, 2.0))


def test_both_panels_of_figure_11_are_rows_and_lines() -> None:
    names = ("vLLM", "vLLM++", "DistServe-Low", "DistServe-High")
    curves = ablation.Curves(
        dict.fromkeys(names, "1m"),
        {name: [0.9] * len(ablation.RATES) for name in names},
        {name: [1.0, 0.95, 0.9, 0.5, 0.25] for name in names},
        dict.fromkeys(names, 0.8),
    )
    rows = {row.what: row for row in ablation_rows(curves)}
    assert rows["Figure 11: vLLM++ (1m) at 0.25/s/GPU, % attained"].paper == 58.0
    tight = rows["Figure 11b: DistServe-Low (1m) at SLO scale 0.4, % attained"]
    assert (tight.paper, tight.ours) == (46.7, 25.0)
    least = rows["Figure 11b: DistServe-High (1m), smallest SLO scale"]
    assert least.paper == pytest.approx(0.8 + 0.2 * 1.3 / 6.6)  # 90 between 88.7 and 95.3
    assert rows["Figure 11b: vLLM (1m), smallest SLO scale"].paper is None  # 79 at most
    picture = figures.eleven(curves)
    assert picture.count("<clipPath") == 2 and "SLO scale" in picture
    assert picture.count("<polyline") == 2 * 6 + len(figures.ABLATION_TITLES)


@NEEDS_DATA
def test_lengths_have_the_published_means() -> None:
    for name, prompt, output in (
        ("sharegpt", 758.7, 186.3),
        ("humaneval", 171.35, 98.17),
        ("longbench", 1738.3, 90.7),
    ):
        pairs = lengths(name)
        assert sum(pair[0] for pair in pairs) / len(pairs) == pytest.approx(prompt, rel=0.01)
        assert sum(pair[1] for pair in pairs) / len(pairs) == pytest.approx(output, rel=0.06)
        assert max(map(sum, pairs)) < 2048


@NEEDS_DATA
@pytest.mark.parametrize("name", ["distserve-300-3", "distserve-300-6"])
def test_below_the_knee_the_simulator_agrees_with_measured_runs(name: str) -> None:
    compared = validate.compare(name)
    assert compared.below_knee and compared.met, compared


@pytest.mark.skipif(kernels.missing() is not None, reason=f"{kernels.missing()} is not here")
@pytest.mark.parametrize(
    ("name", "tp"), [("llama-3.1-70b-fp8-h200", 8), ("qwen3-32b-bf16-h100", 2)]
)
def test_terms_of_hopper_gpus_are_those_of_the_tables(name: str, tp: int) -> None:
    model, precision, gpu = name.rsplit("-", 2)
    found = fit.fit(f"{gpu}_sxm", precision, kernels.MODELS[model], tp)
    assert FITS[name][tp].prefill == pytest.approx(found.prefill, rel=1e-3)
    assert FITS[name][tp].small == pytest.approx(found.decode.small, rel=1e-3)
    assert FITS[name][tp].large == pytest.approx(found.decode.large, rel=1e-3)
    assert found.error < 0.12


def test_the_page_shows_the_kept_result() -> None:
    kept, text = page.read(page.RESULT.read_text()), page.PAGE.read_text()
    assert page.filled(text, kept) == text
    other = kept._replace(
        steady={name: dict.fromkeys(ways, 9.5) for name, ways in kept.steady.items()}
    )
    assert "| 13B ShareGPT | 9.5 | 9.5 | 9.5 |" in page.filled(text, other)
    with pytest.raises(ValueError, match="0 places for the table 'rates'"):
        page.filled(text.replace("<!-- table rates -->", ""), kept)
