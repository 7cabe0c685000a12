"""Every kernel against its reference: the tests of tests/reference/gpu and of tests/gpu.

They are pytest tests like any other; without a GPU the former interpret the kernels, here both run
them. One line for each file, so that a broken kernel is named.
"""

import importlib.util
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from bench.gpu.bed import Bed
from bench.gpu.lines import Line, check

ROOT = Path(__file__).parents[3]
FOLDERS = ("tests/gpu", "tests/reference/gpu")
# What a rehearsal runs of it: enough to see that results are found and read.
REHEARSED = ("tests/reference/gpu/test_attention_libraries.py",)
LEFT_OUT = (
    # These compile for other cards, as the checks of a machine without any do.
    "tests/reference/gpu/test_compile.py",
    "tests/reference/gpu/test_attention_compiles.py",
    "tests/gpu/test_sections.py",  # these are we
)
NUM_PROCESSES = 8  # most of the time goes to the compiler of the kernels
NUM_NAMED = 4


@dataclass
class Outcome:
    """Tests of one file."""

    passed: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)


def run(bed: Bed) -> None:
    with tempfile.TemporaryDirectory(prefix="nodeserve-kernels-") as folder:
        report = Path(folder, "report.xml")
        code = pytest(REHEARSED if bed.rehearsal else FOLDERS, report)
        outcomes = read(report) if report.exists() else {}
    bed.sheet.add(*lines_of(outcomes))
    # 1 is "some failed", which the lines say; anything else is a run that did not take place.
    bed.sheet.add(check("the tests were run", code in (0, 1) and bool(outcomes), f"exit {code}"))


def pytest(targets: tuple[str, ...], report: Path) -> int:
    # Warnings of another version of torch are no failures of a kernel.
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider"]
    command += [f"--ignore={path}" for path in LEFT_OUT]
    if importlib.util.find_spec("xdist") is not None and len(targets) > 1:
        command += [f"--numprocesses={NUM_PROCESSES}"]
    done = subprocess.run([*command, f"--junitxml={report}", *targets], cwd=ROOT)
    return done.returncode


def read(report: Path) -> dict[str, Outcome]:
    """By test file, from pytest's XML."""
    outcomes: dict[str, Outcome] = defaultdict(Outcome)
    for case in ET.parse(report).getroot().iter("testcase"):
        outcome = outcomes[(case.get("classname") or "?").rpartition(".")[2]]
        if case.find("failure") is not None or case.find("error") is not None:
            outcome.failed.append(case.get("name") or "?")
        elif case.find("skipped") is not None:
            outcome.skipped += 1
        else:
            outcome.passed += 1
    return dict(outcomes)


def lines_of(outcomes: dict[str, Outcome]) -> list[Line]:
    """A file passes if something in it passed and nothing failed; skipped tests are counted."""
    found = []
    for name, outcome in sorted(outcomes.items()):
        note = f"{outcome.passed} passed, {len(outcome.failed)} failed, {outcome.skipped} skipped"
        if outcome.failed:
            more = " ..." if len(outcome.failed) > NUM_NAMED else ""
            note += f": {', '.join(outcome.failed[:NUM_NAMED])}{more}"
        found.append(check(name, outcome.passed > 0 and not outcome.failed, note))
    return found
