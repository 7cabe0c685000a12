"""Ways to run a target: each in a process of its own, with a log, for a time."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME = ROOT / "build" / "fuzz"
ENVIRONMENT = HOME / "env"
ATHERIS = "atheris>=3,<4"
COMPILERS = ("clang++", *(f"clang++-{number}" for number in range(21, 13, -1)))
COMPILED = ("-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Icsrc")
CHECKED = ("-fno-sanitize-recover=all", "csrc/ring/fuzz.cpp", "-o")
RSS_MB = 4096
INPUT_S = 20  # a single input that takes longer is a finding
GRACE_S = 120.0  # for imports, and to make a found case smaller
_EXECUTIONS = (
    re.compile(r"^executions: (\d+)$", re.MULTILINE),
    re.compile(r"^stat::number_of_executed_units:\s*(\d+)$", re.MULTILINE),
)
LAST_LINES = 25


@dataclass(frozen=True)
class Outcome:
    """What became of a target. `finding` is the end of its log; `skipped`: why it did not run."""

    target: str
    tool: str
    executions: int = 0
    seconds: float = 0.0
    finding: str | None = None
    skipped: str | None = None


Tool = Callable[[str, float], Outcome]


def alone(target: str, seconds: float) -> Outcome:
    """Hypothesis' histories, or seeds changed at random."""
    command = [sys.executable, "-m", "tests.fuzz.alone", target, str(seconds)]
    return _ran(target, "hypothesis", command, seconds)


def atheris(target: str, seconds: float) -> Outcome:
    """Guided by the coverage of our Python."""
    if reason := _no_atheris():
        return Outcome(target, "atheris", skipped=reason)
    command = [str(ENVIRONMENT / "bin/python"), "-m", "tests.fuzz.guided", target]
    return _ran(target, "atheris", [*command, *_corpus(target), *_limits(seconds)], seconds)


def libfuzzer(target: str, seconds: float) -> Outcome:
    """Guided by the coverage of our C++, under the sanitizers."""
    program = HOME / target
    if reason := _compile(program):
        return Outcome(target, "libFuzzer", skipped=reason)
    command = [str(program), *_corpus(target), *_limits(seconds)]
    return _ran(target, "libFuzzer", command, seconds)


def ring_alone(target: str, seconds: float) -> Outcome:
    """Random programs and a peer that scribbles, under gcc's sanitizers."""
    program = HOME / target
    flags = ("-DFUZZ_ALONE", "-pthread", "-fsanitize=address,undefined")
    HOME.mkdir(parents=True, exist_ok=True)
    done = _quiet([os.environ.get("CXX", "g++"), *COMPILED, *flags, *CHECKED, str(program)])
    if done.returncode:
        return Outcome(target, "g++", skipped=f"does not compile: {done.stderr[-300:]}")
    return _ran(target, "g++", [str(program), str(seconds), str(time.time_ns() % 2**32)], seconds)


def _corpus(target: str) -> list[str]:
    folder = HOME / "corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    return [str(folder)]


def _limits(seconds: float) -> list[str]:
    found = HOME / "found"
    found.mkdir(parents=True, exist_ok=True)
    return [
        f"-max_total_time={max(1, round(seconds))}",
        f"-timeout={INPUT_S}",
        f"-rss_limit_mb={RSS_MB}",
        f"-artifact_prefix={found}/",
        "-print_final_stats=1",
    ]


def _no_atheris() -> str | None:
    """Install it beside us once; else why not."""
    python = ENVIRONMENT / "bin/python"
    if not python.exists():
        _quiet([sys.executable, "-m", "venv", str(ENVIRONMENT)])
        # Everything but the tool itself is what we run with anyway.
        ours = sysconfig.get_path("purelib")
        place = next((ENVIRONMENT / "lib").glob("python*/site-packages"))
        (place / "ours.pth").write_text(f"{ours}\n")
    if _quiet([str(python), "-c", "import atheris"]).returncode == 0:
        return None
    done = _quiet([str(python), "-m", "pip", "install", "-q", ATHERIS])
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        return f"atheris cannot be installed for this Python: {last}"
    return None


def _compile(program: Path) -> str | None:
    """Build the ring's fuzzer; else why not."""
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        return "no clang here (Debian has packages clang and libclang-rt-dev)"
    HOME.mkdir(parents=True, exist_ok=True)
    flags = ("-fsanitize=fuzzer,address,undefined",)
    done = _quiet([compiler, *COMPILED, *flags, *CHECKED, str(program)])
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it failed"])[-1]
        return f"{compiler} cannot build it (is its libclang-rt-dev there?): {last}"
    return None


def _quiet(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def _ran(target: str, tool: str, command: Sequence[str], seconds: float) -> Outcome:
    log = HOME / f"{target}-{tool}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began_s = time.monotonic()
    with log.open("wb") as file:
        try:
            code = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=file,
                timeout=seconds + GRACE_S,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
    text = log.read_text(errors="replace")
    counted = [int(found) for pattern in _EXECUTIONS for found in pattern.findall(text)]
    end = "\n".join(line[:2000] for line in text.splitlines()[-LAST_LINES:])
    finding = None if code == 0 and counted else f"ended with {code}; {log}\n{end}"
    return Outcome(target, tool, sum(counted), time.monotonic() - began_s, finding)
