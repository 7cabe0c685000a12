"""The extensions are built in place for this card, and the machine says what it is.

Only this card's architecture: the others take minutes and cannot run here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.gpu.bed import Bed
from bench.gpu.lines import Line, check

ROOT = Path(__file__).parents[3]
NOTE_CHARS = 300
# What pyproject.toml asks for; a machine without a registry has what it has.
EXTRAS = frozenset({"dev", "cuda"})


def run(bed: Bed) -> None:
    if not bed.rehearsal:
        bed.sheet.add(built(ROOT))
    bed.sheet.add(imported(bed))
    bed.sheet.add(*versions())
    bed.sheet.add(doctor(bed))


def built(root: Path) -> Line:
    """`setup.py build_ext --inplace`, whose output is kept when it fails."""
    arch = architecture()
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=root,
        env={**os.environ, "NODESERVE_CUDA_ARCHS": arch, "NODESERVE_BUILD_JOBS": "16"},
        capture_output=True,
        text=True,
    )
    print(done.stdout, done.stderr, sep="\n")
    note = "" if done.returncode == 0 else tail(done.stderr or done.stdout)
    return check(f"extensions build for sm_{arch}", done.returncode == 0, note)


def architecture() -> str:
    """Of the first GPU: "90" for compute capability 9.0."""
    import pynvml

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return "".join(map(str, pynvml.nvmlDeviceGetCudaComputeCapability(handle)))
    finally:
        pynvml.nvmlShutdown()


def imported(bed: Bed) -> Line:
    """In a process of its own: this one may have loaded an older build."""
    module = "tests.fakes.cuda.build" if bed.rehearsal else "nodeserve._cuda"
    loads = "load_fake_cuda()" if bed.rehearsal else "cuda"
    script = (
        f"import {module} as cuda; found = cuda.{loads}; print(found.device_count())"
        if bed.rehearsal
        else "import nodeserve._cuda as cuda; print(cuda.device_count(), cuda.memory(0))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    passed = done.returncode == 0 and int(done.stdout.split()[0]) >= 1
    return check("_cuda is imported and counts devices", passed, tail(done.stderr))


def versions() -> list[Line]:
    """What pyproject.toml asks for and this machine has in another version, or not at all."""
    missing, different = unmet()
    return [
        check("every package that serving needs is here", not missing, ", ".join(missing)),
        Line(
            "packages outside pyproject's range",
            "info",
            len(different),
            "",
            note="; ".join(different),
        ),
    ]


def unmet() -> tuple[list[str], list[str]]:
    """Requirements of the package: those missing, and those in a version that is out of range."""
    import importlib.metadata
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    missing, different = [], []
    for text in project["dependencies"]:
        wanted = Requirement(text)
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(wanted.name)
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            different.append(f"{text}, here {version}")
    return missing, different


def doctor(bed: Bed) -> Line:
    """`nodeserve doctor --json`, kept whole in the record."""
    done = subprocess.run(
        [sys.executable, "-m", "nodeserve", "doctor", "--json"], capture_output=True, text=True
    )
    try:
        bed.sheet.keep(doctor=json.loads(done.stdout))
    except ValueError:
        return check("nodeserve doctor", False, tail(done.stderr or done.stdout))
    # In a rehearsal it may find fault with a machine that has no GPU; it has to answer.
    passed = done.returncode == 0 or bed.rehearsal
    return check("nodeserve doctor", passed, tail(done.stderr), exit_code=done.returncode)


def tail(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-NOTE_CHARS:]
