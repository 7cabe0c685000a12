"""The window benchmark's own logic: ratios, searches, verdicts, the picture."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest

from bench.window import aims, tables
from bench.window.campaign import Campaign
from bench.window.compare import Compared, compare
from bench.window.grid import ARMS, BY_LETTER, SHAPES, SMOKE, SOUND, Point, Shape
from bench.window.picture import Panel, ceiling_for, draw
from bench.window.runs import (
    MEASURES,
    Run,
    idle_times,
    longest_idle_wait_s,
    saturation,
    serve,
    trace,
)
from bench.window.search import highest_load, limits
from bench.window.stats import Samples, mean_ratio, p99, p99_ratio, pairs_ratio
from bench.window_live import Found, check
from nodeserve.plan.records import Faults, Outcome, Pass
from nodeserve.plan.summary import STAGES
from nodeserve.policy.cost import IDLE


def samples(*values: float) -> Samples:
    return np.array(values, dtype=np.float32)


def noisy(scale: float, seed: int) -> Samples:
    return (scale * np.random.default_rng(seed).exponential(size=400)).astype(np.float32)


# ---- ratios


@pytest.mark.parametrize(
    ("count", "expected"), [(1, 1.0), (99, 99.0), (100, 99.0), (101, 100.0), (1000, 990.0)]
)
def test_p99_is_the_smallest_sample_that_99_percent_do_not_exceed(
    count: int, expected: float
) -> None:
    shuffled = np.random.default_rng(count).permutation(np.arange(1.0, count + 1))
    assert p99(shuffled.astype(np.float32)) == expected


def test_pairs_that_keep_their_ratio_have_an_interval_without_width() -> None:
    theirs = [noisy(1.0, seed) for seed in range(5)]
    ratio = mean_ratio([run * np.float32(0.5) for run in theirs], theirs)
    assert ratio == pytest.approx((0.5, 0.5, 0.5))
    assert p99_ratio([run * np.float32(0.5) for run in theirs], theirs) == pytest.approx(
        (0.5, 0.5, 0.5)
    )


def test_unpaired_noise_widens_the_interval_and_it_holds_the_truth() -> None:
    theirs = [noisy(1.0, seed) for seed in range(5)]
    ours = [noisy(0.8, seed + 100) for seed in range(5)]
    value, low, high = mean_ratio(ours, theirs)
    assert low < value < high
    assert low < 0.8 < high
    assert 0.05 < high - low < 0.4


def test_a_ratio_of_means_weighs_requests_not_runs() -> None:
    ours, theirs = [samples(1, 1, 1, 1), samples(9, 9, 9, 9)], [samples(*[2.0] * 4)] * 2
    assert mean_ratio(ours, theirs).value == pytest.approx(2.5)


def test_pairs_of_seeds() -> None:
    assert pairs_ratio([12, 24, 36], [10, 20, 30]) == pytest.approx((1.2, 1.2, 1.2))
    ratio = pairs_ratio([11, 26, 36], [10, 20, 30])
    assert ratio.low < ratio.value < ratio.high


# ---- searches


@pytest.mark.parametrize("last", [0, 1, 57, 99, 129, 130])
def test_the_highest_load_is_found_exactly_in_eight_calls(last: int) -> None:
    calls = []

    def meets(step: int) -> bool:
        calls.append(step)
        return step <= last

    assert highest_load(meets) == last / 100
    assert len(calls) <= 8
    assert min(calls) > 0


def test_limits_share_what_was_measured() -> None:
    calls: list[float] = []

    def measure(load: float) -> tuple[float, float]:
        calls.append(load)
        return load, 3 * load

    assert limits(measure, 1.0, 2.0) == (1.0, 0.66)
    assert len(calls) == len(set(calls))


# ---- verdicts


def run(scale: float, seed: int, tail: float, num_lost: int, **measured: float) -> Run:
    ttft_s = scale + noisy(0.01, seed)
    ttft_s[::50] += tail  # 2 % of all
    return Run(ttft_s, dict.fromkeys(MEASURES, 0.1) | measured, num_lost)


def at(
    point: Point,
    scales: dict[str, float],
    tail: float = 0.0,
    num_lost: int = 0,
    device_wait_s: float = 0.001,
    idle_wait_s: float = 0.1,
) -> Compared:
    """A grid point where each arm's TTFT is about `scales` (1 where not given); the rest is of
    G alone."""
    runs = {
        letter: [
            run(
                scales.get(letter, 1.0),
                8 * seed + ord(letter),
                tail if letter == "G" else 0.0,
                num_lost if letter == "G" else 0,
                device_wait_s=device_wait_s,
                idle_wait_s=idle_wait_s,
            )
            for seed in range(5)
        ]
        for letter in BY_LETTER
    }
    return compare(point, 50.0, runs)


FAR = {"A": 2.0, "B": 1.6, "C": 1.5, "D": 1.01, "E": 1.7, "F": 1.2}  # of G's TTFT, the best last


def test_all_aims_met() -> None:
    rates = {"4x8": {arm: [(50.0, 40.0)] * 5 for arm in SOUND} | {"G": [(61.0, 49.0)] * 5}}
    compared = [at(aims.HEADLINE, FAR)]
    found = aims.check(compared, rates)
    assert all(aim.met for aim in found), [str(aim) for aim in found]
    assert aims.violations(compared) == []
    assert compared[0].best == "C"


@pytest.mark.parametrize(
    ("name", "compared", "rates"),
    [
        ("mean TTFT", at(aims.HEADLINE, FAR | {"C": 1.35}), {}),
        ("P99 TTFT", at(aims.HEADLINE, FAR, tail=1.0), {}),
        ("QPS at a limit of mean", None, {"C": [(52.0, 40.0)] * 5}),
        ("QPS at a limit of P99", None, {"A": [(50.0, 42.0)] * 5}),
        ("G against every arm", at(aims.HEADLINE, FAR | {"D": 0.97}), {}),
        ("device wait", at(aims.HEADLINE, FAR, device_wait_s=0.2), {}),
        ("lost requests", at(aims.HEADLINE, FAR, num_lost=1), {}),
        ("wait beside an idle instance", at(aims.HEADLINE, FAR, idle_wait_s=5.0), {}),
    ],
)
def test_each_aim_can_be_missed(
    name: str, compared: Compared | None, rates: dict[str, list[tuple[float, float]]]
) -> None:
    good = {arm: [(50.0, 40.0)] * 5 for arm in SOUND} | {"G": [(61.0, 49.0)] * 5}
    found = aims.check([compared or at(aims.HEADLINE, FAR)], {"4x8": good | rates})
    missed = [aim.name for aim in found if not aim.met]
    assert len(missed) == 1
    assert missed[0].startswith(name)


def test_what_was_not_run_is_neither_met_nor_missed() -> None:
    elsewhere = at(Point(SHAPES[1], "poisson", "fixed:1500", 0.2), FAR)
    found = {aim.name: aim.met for aim in aims.check([elsewhere], {})}
    assert list(found.values()).count(None) == 5
    assert found["G against every arm at every point"] is True


def test_violations_are_listed_with_their_arm_and_how_sure_they_are() -> None:
    point = Point(SHAPES[3], "gamma:3", "fixed:1500", 0.2)
    found = aims.violations([at(point, FAR | {"A": 0.5, "D": 0.9798})])
    assert [(one.arm, one.sure) for one in found] == [("A", True), ("D", False)]
    assert "1x8 gamma:3 fixed:1500 20%: 1.98" in str(found[0])


def test_tables_name_every_arm_and_point() -> None:
    points = [
        Point(shape, "poisson", "lognormal:1500", load)
        for shape in SHAPES[:2]
        for load in (0.2, 0.6)
    ]
    compared = [at(point, FAR) for point in points]
    text = "\n".join([*tables.ttft_tables(compared), *tables.stage_tables(compared)])
    assert text.count("mean / P99 TTFT in ms") == 2
    assert text.count(f"{1e3 * compared[0].measures['A']['mean_s']:.0f}/") == 4
    for arm in ARMS:
        assert text.count(f"\n{arm.letter} {arm.title}") == 4


# ---- the picture

SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_is_well_formed_and_its_texts_do_not_overlap() -> None:
    titles = {arm: f"title of {arm} <&>" for arm in SOUND}
    lines = {arm: [(load, 300 + 1000 * load) for load in (0.2, 0.6, 0.9)] for arm in SOUND}
    panels = [Panel(str(shape), lines, 2500.0) for shape in SHAPES]
    root = ElementTree.fromstring(draw("title", titles, panels, "mean TTFT, ms"))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    boxes = []
    for text in root.iter(f"{SVG}text"):
        x, y = float(text.attrib["x"]), float(text.attrib["y"])
        size, content = float(text.attrib["font-size"]), text.text or ""
        if (x, y) == (0.0, 0.0):
            continue  # along the y axis, turned
        long = 0.62 * size * len(content)
        left = x - {"start": 0.0, "middle": long / 2, "end": long}[text.attrib["text-anchor"]]
        boxes.append((left, y - 0.75 * size, left + long, y + 0.25 * size, content))
        assert left >= 0 and left + long <= width and 0 < y < height, content
    for number, (left, top, right, bottom, content) in enumerate(boxes):
        for other in boxes[:number]:
            apart = right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
            assert apart, (content, other[4])
    assert len(list(root.iter(f"{SVG}polyline"))) == len(SOUND) * 5


def test_points_stand_where_the_axes_say() -> None:
    panel = Panel("one", {"G": [(0.0, 0.0), (0.5, 50.0), (1.0, 100.0)]}, 100.0)
    root = ElementTree.fromstring(draw("t", {"G": "g"}, [panel], "y"))
    drawn = [line.attrib["points"] for line in root.iter(f"{SVG}polyline")][-1]
    places = [tuple(map(float, place.split(","))) for place in drawn.split()]
    ruler = {
        text.text: (float(text.attrib["x"]), float(text.attrib["y"]))
        for text in root.iter(f"{SVG}text")
    }
    assert places[0][0] == ruler["0 %"][0]
    assert places[2][0] == ruler["100 %"][0]
    assert places[1][0] == (places[0][0] + places[2][0]) / 2
    assert places[0][1] == ruler["0"][1] - 4
    assert places[2][1] == ruler["100"][1] - 4


@pytest.mark.parametrize(
    ("values", "highest"), [((0.3, 1.0), 1.0), ((1.1,), 1.25), ((2400,), 2500), ((2600,), 3000)]
)
def test_axes_end_at_round_numbers(values: tuple[float, ...], highest: float) -> None:
    assert ceiling_for(values) == pytest.approx(highest)


# ---- one run


def test_the_longest_wait_beside_an_idle_instance() -> None:
    waits = [(0.0, 0.0), (1.0, 2.0), (3.0, 9.0)]
    assert longest_idle_wait_s(waits, [(0.0, 0.9), (1.8, 3.5), (8.0, 8.2)]) == pytest.approx(0.5)
    assert longest_idle_wait_s(waits, [(2.0, 3.0)]) == 0.0
    assert longest_idle_wait_s([(0.0, 0.0)], [(0.0, 5.0)]) == 0.0
    assert longest_idle_wait_s([], [(0.0, 5.0)]) == 0.0


def test_idle_times_are_those_of_living_instances() -> None:
    passes = [Pass(0, 1.0, 1.0, 0.0, (IDLE,)), Pass(1, 0.5, 2.0, 0.0, (IDLE,))]
    outcome = Outcome([], passes, 10.0)
    times = idle_times(outcome, Shape(2, 1), Faults(kill_instance=0, kill_at_s=4.0))
    assert times == [(0.0, 1.0), (2.0, 4.0), (0.0, 0.5), (2.5, 10.0)]


def test_saturation_is_below_what_is_possible_and_a_lone_request_takes_its_pass() -> None:
    found = saturation(Shape(1, 2), "fixed:1500", (11, 23), 200)
    # A full rank: 60 ms, 4096 x (0.1 + 0.03) ms, 4096 tokens that see 750 others on average, 6 ns.
    full_s = 0.060 + 4096 * 1.3e-4 + 4096 * 750 * 6e-9
    assert found.ceiling_qps == pytest.approx(2 * 4096 / full_s / 1500)
    assert 0.8 * found.ceiling_qps < found.qps < 1.02 * found.ceiling_qps
    # One of two ranks works, the experts' share is halved; two ways of 2.5 ms.
    lone_s = 0.060 + 1500 * 1.15e-4 + 1500 * 750 * 6e-9
    assert found.floor_s == pytest.approx(lone_s + 0.005)


def test_arms_serve_the_same_requests_and_the_windowed_one_keeps_its_queue_in_the_buffer() -> None:
    shape, requests = Shape(2, 2), trace("poisson", "lognormal:1500", 11.0, 11, 300)
    runs = {arm: serve(BY_LETTER[arm], shape, requests, 11) for arm in "CGH"}
    assert {len(run.ttft_s) for run in runs.values()} == {240}
    assert [run.num_lost for run in runs.values()] == [0, 0, 0]
    assert runs["C"].measures["scheduler_wait_s"] == 0.0
    assert runs["C"].measures["device_wait_s"] > 10 * runs["G"].measures["device_wait_s"]
    assert runs["H"].measures["mean_s"] > runs["G"].measures["mean_s"]
    stages = sum(runs["G"].measures[stage] for stage in STAGES)
    assert stages == pytest.approx(runs["G"].measures["mean_s"], rel=1e-4)


@pytest.mark.slow
def test_results_come_in_the_order_of_the_plan_from_several_processes() -> None:
    plan = replace(SMOKE, requests_per_rank=8)
    alone, together = Campaign(plan, 1), Campaign(plan, 2)
    assert alone.saturate() == together.saturate()
    assert [one.to_json() for one in alone.compare()] == [
        one.to_json() for one in together.compare()
    ]


# ---- live


def found(live_s: float, predicted_s: float, device_wait_s: float = 0.0, failed: int = 0) -> Found:
    stages = dict.fromkeys(STAGES, 0.1)
    live = stages | {"mean_s": live_s, "p99_s": live_s, "device_wait_s": device_wait_s}
    return Found(live, {**stages, "mean_s": predicted_s, "p99_s": predicted_s}, failed, 0.0, live_s)


LIVE = {
    "A": found(0.56, 0.55, 0.2),
    "C": found(0.57, 0.56, 0.2),
    "D": found(0.41, 0.40),
    "G": found(0.40, 0.41),
}


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, []),
        ({"G": found(0.40, 0.41, device_wait_s=0.03)}, [0]),
        ({"A": found(0.39, 0.40)}, [1]),
        ({"C": found(0.409, 0.44)}, [2]),  # D is 10 % ahead of it when simulated
        ({"D": found(0.45, 0.40)}, [3]),
        ({"D": found(0.36, 0.401)}, [3]),
        ({"A": found(0.56, 0.55, failed=1)}, [4]),
    ],
)
def test_verdicts_of_the_live_run(changed: dict[str, Found], missed: list[int]) -> None:
    verdicts = check(LIVE | changed)
    assert [number for number, (_, met) in enumerate(verdicts) if not met] == missed
