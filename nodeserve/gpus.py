"""The GPUs of this machine, as the driver's management library tells: no CUDA context, no torch."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU; `index` counts in PCI bus order, as `nvidia-smi` does."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Gpus:
    """What CUDA workers could run on, or why none can run."""

    found: tuple[Gpu, ...] = ()
    obstacle: str | None = None  # None: CUDA workers can run here

    @property
    def usable(self) -> bool:
        return self.obstacle is None


def find_gpus() -> Gpus:
    """Asks the driver, then looks whether torch and our own extension can use what is there."""
    found, obstacle = _listed()
    return Gpus(found, obstacle or _torch_obstacle() or _extension_obstacle())


def _listed() -> tuple[tuple[Gpu, ...], str | None]:
    import pynvml  # here and not above: a machine without a GPU need not load it

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as problem:
        return (), f"no NVIDIA driver answers ({problem})"
    try:
        found = tuple(_described(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError as problem:
        return (), f"the NVIDIA driver cannot list its GPUs ({problem})"
    finally:
        pynvml.nvmlShutdown()
    return found, None if found else "the NVIDIA driver sees no GPU"


def _described(pynvml: "object", index: int) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)  # type: ignore[attr-defined]
    name = pynvml.nvmlDeviceGetName(handle)  # type: ignore[attr-defined]
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)  # type: ignore[attr-defined]
    return Gpu(index, str(name), int(memory.total), int(memory.free))


def _torch_obstacle() -> str | None:
    """By its files: loading torch takes seconds, and the coordinator never does."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return "torch is not installed"
    libraries = Path(spec.submodule_search_locations[0], "lib")
    if not (libraries / "libtorch_cuda.so").exists():
        return "the installed torch is a CPU build: install one with CUDA"
    return None


def _extension_obstacle() -> str | None:
    if importlib.util.find_spec("nodeserve._cuda") is None:
        return "nodeserve._cuda is not built: install with the CUDA toolkit's nvcc on the PATH"
    return None
