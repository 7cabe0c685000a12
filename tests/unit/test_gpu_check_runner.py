"""Sections as processes: what is kept of one that crashes, hangs, or forks and hangs."""

import os
import sys
import time
from pathlib import Path

from bench.gpu.lines import FAIL, NOT_REACHED, PASS
from bench.gpu.plan import Section
from bench.gpu.runner import Result, Runs, Task
from tests.patience import PATIENCE_S

SECTION = """
import json, os, signal, sys, time
from pathlib import Path
from bench.gpu.lines import Sheet, check
name, known, sheet = sys.argv[1], json.load(sys.stdin), Sheet(Path(sys.argv[2]), quiet=True)
sheet.add(check(f"{name} began", True, seen=known.get("ceiling")))
if name == "ceilings":
    sheet.keep(ceiling=7)
if name == "crash":
    os.kill(os.getpid(), signal.SIGSEGV)
if name == "raise":
    raise RuntimeError("an illegal memory access was encountered")
if name == "silent":
    sys.exit(0)
if name == "hang":
    child = os.fork()
    if child:
        Path(sys.argv[2]).with_suffix(".pid").write_text(str(child))
    signal.pause()
sheet.end()
"""


def task(folder: Path) -> Task:
    (folder / "section.py").write_text(SECTION)
    root = str(Path(__file__).parents[2])
    return Task(folder, (), {"PYTHONPATH": root}, (sys.executable, str(folder / "section.py")))


def section(name: str, wave: int, limit_s: float = 60.0) -> Section:
    return Section(name, name, min(limit_s, 1.0), limit_s, 0.01, wave)


def run(folder: Path, *sections: Section, budget_s: float = 60.0) -> dict[str, Result]:
    results: list[Result] = []
    Runs(task(folder), budget_s, results.append).run(sections)
    return {result.section.name: result for result in results}


def states(result: Result) -> list[str]:
    return [line.state for line in result.lines]


def test_a_crash_costs_its_own_section_only(tmp_path: Path) -> None:
    names = ("ceilings", "crash", "raise", "silent", "after")
    results = run(tmp_path, *(section(name, wave) for wave, name in enumerate(names)))
    assert states(results["ceilings"]) == [PASS]
    assert states(results["crash"]) == states(results["raise"]) == [PASS, FAIL]
    assert results["crash"].lines[1].note == "killed by SIGSEGV."
    note = results["raise"].lines[1].note
    assert note == "exit code 1. RuntimeError: an illegal memory access was encountered"
    assert results["silent"].lines[1].note == "exit code 0."
    assert states(results["after"]) == [PASS]
    assert results["after"].lines[0].numbers == {"seen": 7}, "ceilings reach later sections"


def test_a_section_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    results = run(tmp_path, section("hang", 0, limit_s=4.0), section("after", 1))
    assert states(results["hang"]) == [PASS, FAIL]
    assert results["hang"].lines[1].note.startswith("ended after 4 s, its limit.")
    child = int((tmp_path / "hang.pid").read_text())
    assert not alive(child)
    assert states(results["after"]) == [PASS]


def alive(pid: int) -> bool:
    """False also for a process that ended and that nobody has asked about yet."""
    give_up_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up_s:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":
            return False
        os.sched_yield()
    return True


def test_what_there_is_no_time_for_is_said_and_not_begun(tmp_path: Path) -> None:
    late = Section("late", "the late one", 30, 60, 20, 1)
    results = run(tmp_path, section("first", 0), late, budget_s=15.0)
    assert states(results["first"]) == [PASS]
    assert states(results["late"]) == [NOT_REACHED]
    assert "needs 20 s" in results["late"].lines[0].note
    assert not (tmp_path / "late.jsonl").exists()


def test_an_old_sheet_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "silent.jsonl").write_text('{"end": true}\n')
    assert states(run(tmp_path, section("silent", 0))["silent"]) == [PASS, FAIL]
