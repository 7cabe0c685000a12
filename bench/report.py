"""What every benchmark here needs to say: which commit, which machine, one JSON line last."""

import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_ROOT = Path(__file__).parent.parent


def commit() -> str:
    """The short id of the commit that is measured; "+" means with changes on top."""
    command = ("git", "-C", str(_ROOT), "describe", "--always", "--dirty=+", "--exclude=*")
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def cpu_name() -> str:
    """The processor's, as the kernel has it."""
    for text in Path("/proc/cpuinfo").read_text().splitlines():
        if text.startswith("model name"):
            return text.partition(":")[2].strip()
    return platform.machine()


def machine() -> str:
    """The kind of machine: processor, instructions that the kernels care for, usable cores."""
    words = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    best = next((flag for flag in ("amx_bf16", "avx512_bf16", "avx512f") if flag in words), "")
    cores = len(os.sched_getaffinity(0))
    return ", ".join(part for part in (cpu_name(), best, f"{cores} cores") if part)


def percentile(samples: Sequence[float], q: float) -> float:
    """The smallest sample that at least the share `q` (0 to 1) of all does not exceed."""
    return sorted(samples)[max(0, math.ceil(q * len(samples)) - 1)]


def save(path: Path, values: Mapping[str, object]) -> None:
    """Keep a result, with commit and machine, as one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"commit": commit(), "machine": machine(), **values}) + "\n")


def emit(values: Mapping[str, object]) -> None:
    """Print the last line: JSON with the commit and everything that was measured."""
    print(json.dumps({"commit": commit(), **values}), flush=True)
