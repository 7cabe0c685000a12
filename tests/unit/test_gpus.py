"""What is said about GPUs that are missing or cannot be used."""

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from nodeserve import cuda_build
from nodeserve.gpus import Gpu, Gpus, find_gpus


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
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}fed",
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
    assert gpus.found[1] == Gpu(1, "GPU1", 141 << 30, 140 << 30, uuid="GPU-1fed")
    assert gpus.usable == (words is None)
    assert words is None or words in str(gpus.obstacle)


FOUR = Gpus(tuple(Gpu(i, "H200", 141 << 30, 140 << 30, uuid=f"GPU-{i}fed") for i in range(4)))


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (None, [0, 1, 2, 3]),
        ("2,0", [2, 0]),
        (" 3 ", [3]),
        ("GPU-1f,GPU-0fed", [1, 0]),
        ("1,-1,2", [1]),  # as CUDA reads it: the list ends there
        ("0,7,1", [0]),
        ("GPU-,1", []),  # names four
        ("", []),
    ],
)
def test_what_cuda_visible_devices_leaves(visible: str | None, indices: list[int]) -> None:
    gpus = FOUR.seen_through(visible)
    assert [gpu.index for gpu in gpus.found] == indices
    assert gpus.usable == bool(indices)
    assert indices or "hides every GPU" in str(gpus.obstacle)


def test_without_gpus_there_is_nothing_to_hide() -> None:
    none = Gpus(obstacle="no NVIDIA driver answers")
    assert none.seen_through("0") is none
