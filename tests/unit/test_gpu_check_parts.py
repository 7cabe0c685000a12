"""The parts of gpu-check that decide: lines, table, order and time, ties, floors, wheels."""

import json
import zipfile
from pathlib import Path

import pytest

from bench.floors import causal_pairs, layer_weights, step_bytes, step_flops
from bench.gpu import lines, plan, record, table, ties, wheels
from bench.gpu.lines import FAIL, INFO, NOT_REACHED, PASS, Line
from bench.gpu.measure import busy_and_gaps
from bench.gpu.plan import SECTIONS, Section
from bench.gpu.runner import Result
from bench.gpu.shapes import LLAMA_8B, write_config
from nodeserve.config_readers import folder_config
from nodeserve.gpus import Gpu, Gpus

# ---- floors, by hand for Llama-3.1-8B: a layer has 4096 x (4096 + 1024 + 1024) + 4096 x 4096
# + 3 x 4096 x 14336 = 218,103,808 values; the head 128256 x 4096 = 525,336,576


def test_values_of_llama_8b() -> None:
    assert layer_weights(LLAMA_8B) == 32 * 218_103_808 == 6_979_321_856


@pytest.mark.parametrize(
    ("batch", "context", "gigabytes"),
    [
        (1, 0, 15.009316864),
        (1, 1024, 15.143534592),
        (64, 1024, 23.599251456),
        (64, 8192, 83.728793600),
    ],
)
def test_bytes_of_a_decode_step(batch: int, context: int, gigabytes: float) -> None:
    """2 x (6,979,321,856 + 525,336,576) bytes, and 131,072 for each visible token."""
    assert step_bytes(LLAMA_8B, 2, batch * context) == round(gigabytes * 1e9)


def test_operations_of_a_prefill() -> None:
    """2048 tokens: 2 x 2048 x layers, 2 x one row of the head, 4 x 32 x 4096 x pairs."""
    pairs = causal_pairs(2048, 2048)
    assert pairs == 2048 * 2049 // 2 == 2_098_176
    flops = 28_587_302_322_176 + 1_050_673_152 + 1_100_048_498_688
    assert step_flops(LLAMA_8B, 2048, 1, pairs) == flops == 29_688_401_494_016


@pytest.mark.parametrize(("new", "context", "pairs"), [(1, 8, 8), (3, 3, 6), (2, 5, 9), (4, 4, 10)])
def test_pairs(new: int, context: int, pairs: int) -> None:
    assert causal_pairs(new, context) == pairs
    rows = range(context - new, context)
    assert pairs == sum(position + 1 for position in rows)


def test_the_shape_survives_its_config_file(tmp_path: Path) -> None:
    assert folder_config(write_config(LLAMA_8B, tmp_path / "llama")) == LLAMA_8B


# ---- lines


@pytest.mark.parametrize(
    ("ratio", "least", "state"),
    [
        (0.80, 0.8, PASS),
        (0.79, 0.8, FAIL),
        (0.30, None, INFO),
        (1.10, 0.8, PASS),
        (1.11, 0.8, FAIL),  # faster than what is possible: a wrong measurement
        (1.11, None, FAIL),
        (0.0, None, FAIL),
        (float("nan"), 0.8, FAIL),
        (float("inf"), None, FAIL),
    ],
)
def test_a_share_of_a_ceiling(ratio: float, least: float | None, state: str) -> None:
    assert lines.share("step", 1.0, "ms", ratio, least).state == state


@pytest.mark.parametrize(
    ("value", "most", "least"),
    [(9.9, PASS, FAIL), (10.0, PASS, PASS), (10.1, FAIL, PASS), (float("nan"), FAIL, FAIL)],
)
def test_limits(value: float, most: str, least: str) -> None:
    assert lines.at_most("wait", value, "ms", 10.0).state == most
    assert lines.at_least("rate", value, "x", 10.0).state == least


def test_an_unknown_state_is_refused() -> None:
    with pytest.raises(ValueError, match="state 'skipped'"):
        Line("a", "skipped")


def test_a_sheet_keeps_what_was_known_before_a_crash(tmp_path: Path) -> None:
    sheet = lines.Sheet(tmp_path / "s.jsonl", quiet=True)
    sheet.add(lines.check("one", True, number=3))
    sheet.keep(copy_gb_s=4.5)
    found = lines.read_sheet(tmp_path / "s.jsonl")
    assert found.lines == [Line("one", PASS, numbers={"number": 3})]
    assert found.numbers == {"copy_gb_s": 4.5} and not found.ended
    with (tmp_path / "s.jsonl").open("a") as file:
        file.write('{"line": {"name": "tw')  # killed in the middle of a record
    assert lines.read_sheet(tmp_path / "s.jsonl") == found
    assert lines.read_sheet(tmp_path / "none.jsonl").lines == []


def test_a_sheet_that_ended(tmp_path: Path) -> None:
    sheet = lines.Sheet(tmp_path / "s.jsonl", quiet=True)
    sheet.end()
    assert lines.read_sheet(tmp_path / "s.jsonl").ended


# ---- order and time


def section(name: str, wave: int, expected_s: float = 10.0) -> Section:
    return Section(name, name, expected_s, 2 * expected_s, expected_s / 2, wave)


def test_the_plan_fits_its_time() -> None:
    assert plan.expected_s(SECTIONS) <= 480 < plan.TOTAL_S < 600
    assert len({one.name for one in SECTIONS}) == len(SECTIONS)
    folder = Path(plan.__file__).parent / "sections"
    assert {one.name for one in SECTIONS} == {path.stem for path in folder.glob("[a-z]*.py")}


def test_what_measures_runs_alone() -> None:
    waves = [[one.name for one in wave] for wave in plan.waves(SECTIONS)]
    alone = {name for wave in waves if len(wave) == 1 for name in wave}
    measuring = {"ceilings", "speed", "handoff", "served", "continuous", "attention", "experts"}
    assert measuring <= alone
    first = [["build"], ["ceilings"], ["ipc"]]
    assert waves[:3] == first, "the others build on what these find"
    assert max(map(len, waves)) <= plan.MAX_BESIDE


def test_waves_in_their_order() -> None:
    sections = [section("a", 0), section("b", 1), section("c", 1), section("d", 2)]
    assert [[one.name for one in wave] for wave in plan.waves(sections)] == [
        ["a"],
        ["b", "c"],
        ["d"],
    ]
    assert plan.expected_s(sections) == 30.0
    assert not list(plan.waves([]))


@pytest.mark.parametrize(
    ("left_s", "given"), [(100, 20), (20, 20), (19, 19), (5, 5), (4.9, None), (-1, None)]
)
def test_the_time_of_a_section(left_s: float, given: float | None) -> None:
    assert plan.time_for(section("a", 0), left_s) == given


def test_sections_by_name() -> None:
    assert plan.chosen([]) == SECTIONS
    assert [one.name for one in plan.chosen(["speed", "build"])] == ["build", "speed"]
    with pytest.raises(ValueError, match="no section sped: there are build, ceilings"):
        plan.chosen(["sped"])


def test_a_section_with_impossible_times_is_refused() -> None:
    with pytest.raises(ValueError, match="least <= expected <= limit"):
        Section("a", "a", 30, 20, 10, 0)


# ---- the table


def test_rows_can_be_read_and_cut() -> None:
    line = lines.share("decode, 64 x 1024", 6.1234567, "ms", 0.861, 0.8)
    words = table.row(line).split()
    assert words == ["pass", "decode,", "64", "x", "1024", "6.123", "ms", "0.86", ">=", "80%"]
    noted = table.row(lines.check("memcheck", False, "not installed"))
    assert noted.splitlines()[1].strip() == "not installed" and noted.startswith("FAIL")


@pytest.mark.parametrize(
    ("states", "succeeded"),
    [
        ([PASS, INFO], True),
        ([PASS, FAIL], False),
        ([PASS, NOT_REACHED], False),
        ([INFO], False),  # numbers alone prove nothing
        ([], False),
    ],
)
def test_success_needs_a_pass_and_nothing_against(states: list[str], succeeded: bool) -> None:
    results = [Result(SECTIONS[0], [Line("a", state) for state in states])]
    assert table.succeeded(results) is succeeded
    assert sum(table.summary(results).values()) == len(states)


def test_the_closing_line_counts() -> None:
    results = [Result(SECTIONS[0], [Line("a", s) for s in (PASS, PASS, FAIL, NOT_REACHED, INFO)])]
    assert table.closing(results) == ("2 passed, 1 failed, 1 not reached, 1 numbers without an aim")


def test_what_is_not_passed_is_said_again() -> None:
    results = [Result(SECTIONS[0], [Line(s, s) for s in (PASS, FAIL, NOT_REACHED, INFO)])]
    assert [" ".join(row.split()) for row in table.against(results)] == [
        "== not passed",
        "FAIL build: fail",
        "---- build: not reached",
    ]
    assert table.against([Result(SECTIONS[0], [Line("a", PASS)])]) == []


def test_the_record_and_its_short_form(tmp_path: Path) -> None:
    found = [lines.share("a", 2.0, "ms", 0.81234, 0.8), lines.check("b", False, "why", number=7)]
    head = record.heading("abc1234", False, 570.0, Gpus((Gpu(0, "NVIDIA H200", 2, 1),)))
    assert record.stem(head).endswith("-abc1234-NVIDIA-H200")
    values = record.as_json(head, [Result(SECTIONS[3], found, {"x": 1}, 1.234)], complete=True)
    path = tmp_path / "r.json"
    record.write(path, values)
    read = json.loads(path.read_text())
    assert read["sections"][0]["numbers"] == {"x": 1}
    assert read["sections"][0]["lines"][1]["numbers"] == {"number": 7}
    assert read["machine"]["packages"]["numpy"] and read["began"].endswith("+00:00")
    assert not list(tmp_path.glob("*.partial"))
    brief = record.brief(values, path)
    assert brief["ratios"] == {"a": 0.812} and brief["against"] == ["b"]
    assert brief["summary"] == {"pass": 1, "fail": 1, "info": 0, "not reached": 0}


# ---- ties


@pytest.mark.parametrize(
    ("answer", "place", "gap"),
    [([1, 0], None, 0.0), ([1, 1], 1, 0.5), ([0, 0], 0, 2.0), ([0, 1], 0, 2.0)],
)
def test_the_first_difference(answer: list[int], place: int | None, gap: float) -> None:
    found = ties.first_difference(answer, [[1.0, 3.0], [2.0, 1.5]])
    assert found == (None if place is None else ties.Difference(place, gap))
    assert ties.is_tie(found, 0.5) == (gap <= 0.5)


def test_equal_logits_are_no_difference_and_nan_is_no_tie() -> None:
    assert ties.first_difference([1], [[2.0, 2.0]]) is None
    assert not ties.is_tie(ties.Difference(0, float("nan")), 1.0)
    with pytest.raises(ValueError, match="1 tokens and logits for 2"):
        ties.first_difference([1], [[1.0], [1.0]])


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 3], 1), ([], [], None)],
)
def test_where_two_answers_part(one: list[int], other: list[int], place: int | None) -> None:
    assert ties.first_parting(one, other) == place


# ---- pauses


@pytest.mark.parametrize(
    ("spans", "busy", "gaps"),
    [
        ([], 0, []),
        ([(1, 3)], 2, []),
        ([(5, 6), (1, 3)], 3, [2]),
        ([(1, 4), (2, 3), (4, 5)], 4, []),  # one inside another, one right behind
        ([(0, 1), (2, 3), (2.5, 4), (9, 10)], 4, [1, 5]),
    ],
)
def test_busy_time_and_gaps(
    spans: list[tuple[float, float]], busy: float, gaps: list[float]
) -> None:
    assert busy_and_gaps(spans) == (busy, gaps)


# ---- wheels


def make_wheel(folder: Path, name: str, files: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return path


def test_a_wheel_travels_in_parts(tmp_path: Path) -> None:
    folder, text = tmp_path / "wheels", json.dumps(list(range(2000)))
    make_wheel(folder, "large", {"large/data.json": text})
    make_wheel(folder, "small", {"small.py": "x = 1"})
    parts = wheels.split(folder, 4000)
    assert [part.name.partition(".part")[2] for part in parts] == ["0", "1", "2-last"]
    assert sorted(path.name for path in folder.glob("*.whl")) == ["small-1.0-py3-none-any.whl"]
    (folder / "second trip").mkdir()
    parts[1].rename(folder / "second trip" / parts[1].name)
    target = tmp_path / "site"
    assert wheels.install(folder, target) == []
    assert (target / "large" / "data.json").read_text() == text
    assert (target / "small.py").read_text() == "x = 1"
    assert not list(target.glob("*.whl"))


@pytest.mark.parametrize("lost", [0, 1, -1])
def test_a_wheel_that_is_not_whole_is_named_and_left_out(tmp_path: Path, lost: int) -> None:
    folder, target = tmp_path / "wheels", tmp_path / "site"
    make_wheel(folder, "large", {"large.txt": "x" * 9000})
    wheels.split(folder, 2500)[lost].unlink()
    make_wheel(folder, "small", {"small.py": "x = 1"})
    (folder / "torn-1.0-py3-none-any.whl").write_bytes(b"PK")
    make_wheel(folder, "odd", {"odd-1.0.data/scripts/odd": "#!"})
    assert wheels.install(folder, target) == [
        "odd-1.0-py3-none-any.whl: it has a data folder and needs a real installer",
        "torn-1.0-py3-none-any.whl: not a wheel",
        "large-1.0-py3-none-any.whl: of its parts only 3 came along",
    ]
    assert [path.name for path in target.iterdir()] == ["small.py"]


def test_what_is_installed_is_left_alone(tmp_path: Path) -> None:
    """A folder on PYTHONPATH would go before it."""
    make_wheel(tmp_path / "wheels", "numpy", {"numpy.py": "x = 1"})
    assert wheels.install(tmp_path / "wheels", tmp_path / "site") == []
    assert not list((tmp_path / "site").iterdir())


def test_nothing_came_along(tmp_path: Path) -> None:
    assert wheels.install(tmp_path / "none", tmp_path / "site") == []
