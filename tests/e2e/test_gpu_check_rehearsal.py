"""gpu-check's own bugs are found here: every section on the pretended CUDA runtime."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.plan import SECTIONS

ROOT = Path(__file__).parents[2]
ONLY_ON_A_GPU = {
    "compute-sanitizer memcheck over the copies",
    "compute-sanitizer racecheck over the copies",
    "float32: the demo model, 1p1d, gives the tokens of transformers",
}


@pytest.mark.timeout(900)
def test_a_rehearsal_of_everything(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.check", "--rehearse", "--out", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    brief = json.loads(done.stdout.splitlines()[-1])
    record = json.loads(Path(brief["record"]).read_text())
    assert record["rehearsal"] and record["complete"]
    assert {section["name"] for section in record["sections"]} == {one.name for one in SECTIONS}
    lines = [line for section in record["sections"] for line in section["lines"]]
    failed = [line for line in lines if line["state"] == "fail" and not above_ceiling(line)]
    assert not failed, done.stdout
    not_reached = {line["name"] for line in lines if line["state"] == "not reached"}
    assert not_reached == ONLY_ON_A_GPU
    assert done.returncode == 1, "what was not reached is not passed"
    assert done.stdout.count("proves nothing about GPUs") == 2
    assert Path(brief["record"]).parent == tmp_path
    assert Path(brief["record"]).name.startswith("gpu-rehearsal-")
    assert set(brief["against"]) == not_reached and brief["summary"] == record["summary"]


def test_without_a_gpu_it_says_so_in_one_line() -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU here")
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and not done.stdout
    [line] = done.stderr.splitlines()
    assert line.startswith("gpu-check: no GPU to check here: ")


def above_ceiling(line: dict[str, Any]) -> bool:
    """Speeds and ceilings of a CPU that others share are measured at different moments."""
    return str(line["note"]).startswith("above its ceiling")
