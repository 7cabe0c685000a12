"""compute-sanitizer's memcheck and racecheck over the copies of `bench.gpu.copies`."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from bench.gpu.bed import Bed
from bench.gpu.lines import Line, check, unrehearsed

PROGRAM = (sys.executable, "-m", "bench.gpu.copies")
DONE = re.compile(r"^copied (\d+) bytes in (\d+) launches$", re.MULTILINE)
TOOLS = {
    "memcheck": re.compile(r"ERROR SUMMARY: 0 errors"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: 0 hazards"),
}
LIMIT_S = 60.0


def run(bed: Bed) -> None:
    alone = subprocess.run(
        [*PROGRAM, *(["--rehearse"] if bed.rehearsal else [])], capture_output=True, text=True
    )
    print(alone.stdout, alone.stderr, sep="\n")
    passed = alone.returncode == 0 and DONE.search(alone.stdout) is not None
    bed.sheet.add(check("copies of every kind, without the tool", passed, last(alone.stderr)))
    sanitizer = None if bed.rehearsal else find()
    for tool in TOOLS:
        name = f"compute-sanitizer {tool} over the copies"
        if bed.rehearsal:
            bed.sheet.add(unrehearsed(name))
        elif sanitizer is None:
            bed.sheet.add(check(name, False, "not installed"))
        else:
            bed.sheet.add(watched(name, sanitizer, tool))


def find() -> Path | None:
    """On the PATH, or where the toolkit keeps it."""
    found = shutil.which("compute-sanitizer")
    if found:
        return Path(found)
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        for place in ("bin", "compute-sanitizer"):
            path = Path(home or "/nonexistent", place, "compute-sanitizer")
            if os.access(path, os.X_OK):
                return path
    return None


def watched(name: str, sanitizer: Path, tool: str) -> Line:
    """Passed: the program says what it copied, and the tool that it watched and found nothing."""
    try:
        done = subprocess.run(
            [sanitizer, "--tool", tool, "--error-exitcode", "9", *PROGRAM],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return check(name, False, f"not over after {LIMIT_S:.0f} s")
    print(done.stdout, done.stderr, sep="\n")
    return judged(name, tool, done.returncode, done.stdout)


def judged(name: str, tool: str, code: int, output: str) -> Line:
    clean = TOOLS[tool].search(output) is not None
    finished = DONE.search(output) is not None
    note = "" if clean and finished and code == 0 else f"exit code {code}: {last(output)}"
    return check(name, not note, note)


def last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
