"""The fuzzers themselves, and a short run of all that needs no further tool."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import havoc, tools
from tests.fuzz.__main__ import ALL, line_of
from tests.fuzz.machines import MACHINES
from tests.fuzz.targets import TARGETS, Target
from tests.fuzz.tools import Outcome

SECONDS, SEED = 0.5, "1"  # `make fuzz` takes a minute for each


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_seeds_are_small_enough_and_read(target: Target) -> None:
    for seed in (b"", *target.seeds()):
        assert len(seed) <= target.max_bytes
        target.run(seed)


def test_a_planted_defect_is_found_with_its_input() -> None:
    def run(data: bytes) -> None:
        if data.count(b"\xff") > 1:
            raise RecursionError("planted")

    with pytest.raises(RecursionError) as caught:
        havoc.run(Target("planted", run, lambda: [b"some text"]), 60.0, 1)
    (note,) = caught.value.__notes__
    assert bytes.fromhex(note.split("'")[1]).count(b"\xff") > 1


def test_a_target_that_fails_is_told_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "HOME", tmp_path)
    works = "print('executions: 7')"
    for script, words in ((works, None), (f"{works}; raise SystemExit('found')", "found")):
        outcome = tools._ran("one", "sh", [sys.executable, "-c", script], 5.0)
        assert outcome.executions == 7
        assert (outcome.finding is None) == (words is None)
        assert words is None or words in str(outcome.finding)
    silent = tools._ran("one", "sh", [sys.executable, "-c", ""], 5.0)
    assert silent.finding is not None  # it did not even say how often it ran


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tools, "HOME", tmp_path)
    monkeypatch.setattr(tools, "COMPILERS", ("no-such-compiler",))
    assert "skipped: no clang here" in line_of(tools.libfuzzer("ring", 1.0))
    assert "nothing found" in line_of(Outcome("a", "b", 5, 1.0))


def test_every_target_has_a_tool() -> None:
    assert set(ALL) == {*TARGETS, *MACHINES, "ring", "ring-alone"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MACHINES, *TARGETS])
def test_a_short_run_finds_nothing(name: str) -> None:
    """In a process of its own, whose memory is bounded."""
    command = [sys.executable, "-m", "tests.fuzz.alone", name, str(SECONDS), SEED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "executions: 0" not in done.stdout and "executions: " in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no compiler"
)
def test_a_short_run_over_a_damaged_ring_finds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "HOME", tmp_path)
    outcome = tools.ring_alone("ring-alone", 2 * SECONDS)
    assert outcome.finding is None and outcome.skipped is None and outcome.executions > 0
