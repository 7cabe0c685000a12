"""How `_cuda` is built, what is said where it is not, and what the real one does without a GPU."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

from nodeserve import cuda_build

ROOT = Path(__file__).parents[2]
BUILT = cuda_build.cuda_build()
needs_extension = pytest.mark.skipif(bool(BUILT.reason), reason=BUILT.reason)


# ---- what is said


def record(folder: Path, **words: str) -> Path:
    (folder / "_cuda_build.json").write_text(json.dumps(words))
    return folder


def test_a_reason_comes_with_what_to_do(tmp_path: Path) -> None:
    record(tmp_path, reason="no nvcc was found when nodeserve was built")
    assert cuda_build.why_not(tmp_path) == (
        "not built: no nvcc was found when nodeserve was built;"
        " install the CUDA toolkit 12.8 or newer and install nodeserve again"
    )
    record(tmp_path, reason="nodeserve was built with NODESERVE_SKIP_CUDA=1")
    assert cuda_build.why_not(tmp_path).endswith("install it without that switch")


def test_a_folder_that_was_never_built_says_so(tmp_path: Path) -> None:
    assert "never built here" in cuda_build.why_not(tmp_path)


def test_a_build_needs_the_file_as_well(tmp_path: Path) -> None:
    record(tmp_path, reason="", toolkit="13.0", archs="80;90")
    assert cuda_build.why_not(tmp_path).startswith("built for another Python")
    (tmp_path / f"_cuda{EXTENSION_SUFFIXES[0]}").touch()
    assert cuda_build.cuda_build(tmp_path) == cuda_build.CudaBuild("", "13.0", ("80", "90"))
    assert cuda_build.why_not(tmp_path) == ""


# ---- setup.py


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """setup.py as a module that builds nothing, in an environment without switches."""
    for name in ("NODESERVE_SKIP_CUDA", "NODESERVE_CUDA_ARCHS", "CUDA_HOME", "CFLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("nodeserve_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    with monkeypatch.context() as context:
        context.chdir(ROOT)
        spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def toolkit_home(folder: Path, release: str) -> Path:
    nvcc = folder / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, {release}, V1'\n")
    nvcc.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("release", "version"), [("release 12.8", "12.8"), ("release 13.0", "13.0")]
)
def test_a_toolkit_that_is_new_enough_is_used(
    setup: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    release: str,
    version: str,
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit_home(tmp_path, release)))
    toolkit = setup.find_toolkit()
    assert (toolkit.nvcc, toolkit.version) == (str(tmp_path / "bin/nvcc"), version)
    assert toolkit.archs == ("80", "90", "100")


def test_an_old_toolkit_is_a_reason(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit_home(tmp_path, "release 12.6")))
    with pytest.raises(setup.Unusable, match="is of CUDA 12.6"):
        setup.find_toolkit()


def test_no_toolkit_is_a_reason(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(setup, "USUAL_NVCC", str(tmp_path / "nvcc"))
    with pytest.raises(setup.Unusable, match="no nvcc was found"):
        setup.find_toolkit()


def test_the_switch_is_a_reason(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODESERVE_SKIP_CUDA", "1")
    with pytest.raises(setup.Unusable, match="NODESERVE_SKIP_CUDA=1"):
        setup.find_toolkit()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NODESERVE_CUDA_ARCHS", ""),
        ("NODESERVE_CUDA_ARCHS", "sm_90"),
        ("NODESERVE_CUDA_ARCHS", "80,90"),
        ("NODESERVE_SKIP_CUDA", "maybe"),
        ("CUDA_HOME", "/nowhere"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit_home(tmp_path, "release 13.0")))
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=name):
        setup.find_toolkit()


def test_one_variable_names_the_architectures(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit_home(tmp_path, "release 13.0")))
    monkeypatch.setenv("NODESERVE_CUDA_ARCHS", "120;90a")
    flags = [flag for flag in setup.cuda_flags(setup.find_toolkit()) if "gencode" in flag]
    assert flags == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def test_only_what_changed_is_made_again(setup: ModuleType, tmp_path: Path) -> None:
    source, out, log = (tmp_path / name for name in ("source", "made/out", "log"))
    source.write_text("1")
    os.utime(source, (1, 1))

    def make(word: str) -> int:
        command = ["sh", "-c", f"cp {source} {out}; echo {word} >> {log}"]
        setup.make(out, command, [source])
        return len(log.read_text().splitlines())

    assert [make("a"), make("a")] == [1, 1]
    assert [make("b"), make("b")] == [2, 2]  # another command
    os.utime(source, (2**31, 2**31))
    assert make("b") == 3
    with pytest.raises(SystemExit, match="could not be built; this failed: false"):
        setup.make(out, ["false"], [source])


def test_every_source_of_the_extension_is_listed(setup: ModuleType) -> None:
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc/kv").glob("*.c*")}
    assert set(setup.CUDA_SOURCES) == there | {"csrc/api_cuda.cpp"}


# ---- the real one


def architectures(extension: bytes) -> set[tuple[str, int]]:
    """("sm" or "ptx", number) of all device code in an extension.

    A fat binary is a header (magic, version, its size, bytes that follow) and entries, each with
    kind, header size and payload size first, and the architecture at byte 28.
    """
    found = set()
    start = extension.find(struct.pack("<I", 0xBA55ED50))
    while start >= 0:
        _, _, header_bytes, num_bytes = struct.unpack_from("<IHHQ", extension, start)
        entry, end = start + header_bytes, start + header_bytes + num_bytes
        while entry < end:
            kind, _, entry_bytes, payload_bytes = struct.unpack_from("<HHIQ", extension, entry)
            (arch,) = struct.unpack_from("<I", extension, entry + 28)
            found.add(({1: "ptx", 2: "sm"}.get(kind, "other"), arch))
            entry += entry_bytes + payload_bytes
        start = extension.find(struct.pack("<I", 0xBA55ED50), max(end, start + 4))
    return found


@needs_extension
def test_the_extension_holds_code_for_every_architecture() -> None:
    (path,) = (cuda_build.FOLDER / f"_cuda{end}" for end in EXTENSION_SUFFIXES[:1])
    numbers = [int(arch.rstrip("af")) for arch in BUILT.archs]
    found = architectures(path.read_bytes())
    assert found == {("sm", number) for number in numbers} | {("ptx", max(numbers))}


WITHOUT_GPU = """
from nodeserve import _cuda
from nodeserve.errors import BadArgument, CudaError
import numpy as np

pairs, runs = np.zeros((1, 2), np.int32), np.array([[0, 0, 64]])
for call in (
    _cuda.device_count,
    lambda: _cuda.memory(0),
    lambda: _cuda.Pool(0, 1 << 20),
    lambda: _cuda.HostPages(4096, 4096),
    lambda: _cuda.Stream(0),
    lambda: _cuda.Event(0, interprocess=True),
    lambda: _cuda.PeerPool(0, bytes(64), 16),
    lambda: _cuda.copy_pages(
        4096, 64, 8192, 64, pairs, runs, target_stride=64, source_stride=64, stream=2
    ),
):
    try:
        call()
    except CudaError as error:
        print(error)
try:
    _cuda.copy_pages(8, 64, 8192, 64, pairs, runs, target_stride=64, source_stride=64, stream=2)
except BadArgument as error:
    print(error)
"""


@needs_extension
def test_without_a_gpu_calls_fail_in_cudas_words() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_GPU],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    *failures, refusal = done.stdout.splitlines()
    assert len(failures) == 8
    for failure in failures:
        place, words = failure.split(": ", 1)
        assert place.startswith("csrc/kv/") and " cuda" in place
        assert words in {
            "CUDA driver version is insufficient for CUDA runtime version"
            " (cudaErrorInsufficientDriver)",
            "no CUDA-capable device is detected (cudaErrorNoDevice)",
        }
    assert refusal.startswith("target must be an address that is a multiple of 16")
