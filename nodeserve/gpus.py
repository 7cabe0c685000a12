"""The GPUs of this machine, as the driver's management library tells: no CUDA context, no torch."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nodeserve import cuda_build, nvml

MIN_CAPABILITY = (8, 0)  # the oldest GPUs that our kernels are compiled for
MIN_DRIVER_CUDA = (12, 8)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU; `index` counts in PCI bus order, as `nvidia-smi` does."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] | None = None  # CUDA's compute capability; None: not told
    uuid: str = ""


@dataclass(frozen=True, slots=True)
class Gpus:
    """What CUDA workers could run on, or why none can run."""

    found: tuple[Gpu, ...] = ()
    obstacle: str | None = None  # None: CUDA workers can run here
    visible: str | None = None  # CUDA_VISIBLE_DEVICES, where it says which of them to use

    @property
    def usable(self) -> bool:
        return self.obstacle is None

    def seen_through(self, visible: str | None) -> "Gpus":
        """Those that CUDA_VISIBLE_DEVICES leaves, in its order; None: all.

        Read as CUDA does: numbers (in PCI bus order) or beginnings of UUIDs, and an entry that
        names no GPU ends the list.
        """
        if visible is None or not self.found:
            return self
        found = tuple(self._named(visible))
        hidden = None if found else f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU"
        return replace(self, found=found, obstacle=self.obstacle or hidden, visible=visible)

    def _named(self, visible: str) -> Iterator[Gpu]:
        for entry in map(str.strip, visible.split(",")):
            named = [
                gpu
                for gpu in self.found
                if entry == str(gpu.index)
                or (entry.startswith("GPU-") and gpu.uuid.startswith(entry))
            ]
            if len(named) != 1:
                return
            yield named[0]


def find_gpus() -> Gpus:
    """Asks the driver, then looks whether torch and our own extension can use what is there."""
    found, obstacle = _listed()
    return Gpus(found, obstacle or _torch_obstacle() or extension_obstacle())


def _listed() -> tuple[tuple[Gpu, ...], str | None]:
    try:
        with nvml.opened() as pynvml:
            cuda = nvml.cuda_version(pynvml)
            count = pynvml.nvmlDeviceGetCount()
            found = tuple(_described(pynvml, index) for index in range(count))
    except nvml.NvmlFailed as problem:
        return (), str(problem)
    if not found:
        return (), "the NVIDIA driver sees no GPU"
    return found, driver_obstacle(cuda) or capability_obstacle(found)


def _described(pynvml: Any, index: int) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    capability = nvml.told(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    name = str(pynvml.nvmlDeviceGetName(handle))
    uuid = str(nvml.told(pynvml.nvmlDeviceGetUUID, handle) or "")
    return Gpu(index, name, int(memory.total), int(memory.free), capability, uuid)


def driver_obstacle(cuda: tuple[int, int] | None) -> str | None:
    """The driver must run the CUDA that our extension is built with."""
    if cuda is None or cuda >= MIN_DRIVER_CUDA:
        return None
    return (
        f"the NVIDIA driver runs CUDA {_dotted(cuda)} at most: install one for CUDA"
        f" {_dotted(MIN_DRIVER_CUDA)} or newer"
    )


def capability_obstacle(found: tuple[Gpu, ...]) -> str | None:
    """Only where no GPU is new enough: beside a new one an old one is left to `--gpus`."""
    if any(gpu.capability is None or gpu.capability >= MIN_CAPABILITY for gpu in found):
        return None
    gpu = found[0]
    assert gpu.capability is not None
    return (
        f"GPU {gpu.index} ({gpu.name}) has compute capability {_dotted(gpu.capability)}, the"
        f" kernels need {_dotted(MIN_CAPABILITY)} or newer"
    )


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _torch_obstacle() -> str | None:
    """By its files: loading torch takes seconds, and the coordinator never does."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return "torch is not installed"
    libraries = Path(spec.submodule_search_locations[0], "lib")
    if not (libraries / "libtorch_cuda.so").exists():
        return "the installed torch is a CPU build: install one with CUDA"
    return None


def extension_obstacle() -> str | None:
    """Why our CUDA extension cannot be imported at all; None: it is there."""
    reason = cuda_build.why_not()
    return f"nodeserve._cuda is {reason}" if reason else None
