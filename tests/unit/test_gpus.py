"""What is said about GPUs that are missing or cannot be used."""

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from nodeserve import cuda_build
from nodeserve.gpus import Gpu, find_gpus


def memory(_: object) -> SimpleNamespace:
    return SimpleNamespace(total=141 << 30, free=140 << 30)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that lists two of them."""
    calls: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda handle: f"GPU{handle}",
        "nvmlDeviceGetMemoryInfo": memory,
    }
    for name, call in calls.items():
        monkeypatch.setattr(pynvml, name, call)


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, *, cuda: bool, extension: bool) -> None:
    """Make it look as if torch and our extension were there, or were not."""
    (folder / "lib").mkdir()
    if cuda:
        (folder / "lib" / "libtorch_cuda.so").touch()
    torch = ModuleSpec("torch", None, is_package=True)
    torch.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(importlib.util, "find_spec", {"torch": torch}.__getitem__)
    monkeypatch.setattr(cuda_build, "why_not", lambda: "" if extension else "not built: no nvcc; x")


def test_without_a_driver_the_reason_is_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    gpus = find_gpus()
    assert not gpus.usable and not gpus.found
    assert gpus.obstacle is not None and "no NVIDIA driver answers" in gpus.obstacle


@pytest.mark.parametrize(
    ("cuda", "extension", "words"),
    [(False, True, "CPU build"), (True, False, "_cuda is not built"), (True, True, None)],
)
def test_the_first_obstacle_is_named(
    two_gpus: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cuda: bool,
    extension: bool,
    words: str | None,
) -> None:
    install(monkeypatch, tmp_path, cuda=cuda, extension=extension)
    gpus = find_gpus()
    assert gpus.found[1] == Gpu(1, "GPU1", 141 << 30, 140 << 30)
    assert gpus.usable == (words is None)
    assert words is None or words in str(gpus.obstacle)
