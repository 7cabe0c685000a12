"""What the driver's management library says about GPUs and the roads between them.

The one place that calls NVML: no CUDA context, no torch. Whatever a GPU or a virtual machine does
not tell is None.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

Answer = TypeVar("Answer")

_PEER_READ, _PEER_NVLINK = 0, 2  # NVML_P2P_CAPS_INDEX_*; pynvml has a tuple where the first belongs
_PEER_STATUS = {
    0: None,
    1: "the chipset does not support it",
    2: "the GPUs do not support it",
    3: "the road between their I/O hubs does not support it",
    4: "it is disabled in the driver's settings",
    5: "not supported",
}
_ROADS = {
    0: "one board",
    10: "one PCIe switch",
    20: "several PCIe switches",
    30: "PCIe host bridge",
    40: "one NUMA node",
    50: "between CPU sockets",
}
_COMPUTE_MODES = {0: "default", 1: "exclusive", 2: "prohibited", 3: "exclusive"}


class NvmlFailed(Exception):
    """The driver or its library does not answer; the message is NVML's."""


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process with a CUDA context on a GPU."""

    pid: int
    used_bytes: int | None


@dataclass(frozen=True, slots=True)
class GpuState:
    """One GPU; `index` counts in PCI bus order, as `nvidia-smi` does."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] | None  # CUDA's compute capability
    bus_id: str | None
    ecc: bool | None
    persistence: bool | None  # the driver stays loaded when nobody uses the GPU
    mig: bool | None  # cut into instances
    compute_mode: str | None  # "default", "exclusive" (one process) or "prohibited"
    num_nvlinks: int  # links that are up
    numa_node: int | None
    cpus: tuple[int, ...]  # cores near it; none: not told
    processes: tuple[GpuProcess, ...]


@dataclass(frozen=True, slots=True)
class GpuLink:
    """The road between two GPUs."""

    first: int
    second: int
    num_nvlinks: int  # 0: PCIe, or not told
    road: str | None  # the nearest common ancestor on PCIe
    peer_obstacle: str | None  # why one cannot read the other's memory; None: it can


@dataclass(frozen=True, slots=True)
class Survey:
    """All of it. Without a driver only `failure` is set."""

    driver: str | None = None
    cuda: tuple[int, int] | None = None  # the newest CUDA that the driver runs
    gpus: tuple[GpuState, ...] = ()
    links: tuple[GpuLink, ...] = ()
    failure: str | None = None


@contextlib.contextmanager
def opened() -> Iterator[Any]:
    """The library, initialised; NvmlFailed when it cannot be, or when a call in the block fails."""
    import pynvml  # here and not above: a machine without a GPU need not load it

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as problem:
        raise NvmlFailed(f"no NVIDIA driver answers ({problem})") from None
    try:
        yield pynvml
    except pynvml.NVMLError as problem:
        raise NvmlFailed(f"the NVIDIA driver cannot list its GPUs ({problem})") from None
    finally:
        pynvml.nvmlShutdown()


def told(call: Callable[..., Answer], *arguments: Any) -> Answer | None:
    """The answer of one call, None where this GPU, driver or virtual machine does not know it."""
    import pynvml

    try:
        return call(*arguments)
    except pynvml.NVMLError:
        return None


def cuda_version(pynvml: Any) -> tuple[int, int] | None:
    """The newest CUDA that the driver runs: 13000 in NVML's words is (13, 0)."""
    number = told(pynvml.nvmlSystemGetCudaDriverVersion)
    return None if number is None else (number // 1000, number % 1000 // 10)


def survey() -> Survey:
    """Asks for everything; takes some milliseconds a GPU."""
    try:
        with opened() as pynvml:
            handles = [
                pynvml.nvmlDeviceGetHandleByIndex(index)
                for index in range(pynvml.nvmlDeviceGetCount())
            ]
            states = tuple(_state(pynvml, index, handle) for index, handle in enumerate(handles))
            return Survey(
                told(pynvml.nvmlSystemGetDriverVersion),
                cuda_version(pynvml),
                states,
                tuple(_links(pynvml, handles, states)),
            )
    except NvmlFailed as problem:
        return Survey(failure=str(problem))


def _state(pynvml: Any, index: int, handle: Any) -> GpuState:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    bus = told(pynvml.nvmlDeviceGetPciInfo, handle)
    ecc = told(pynvml.nvmlDeviceGetEccMode, handle)
    persistence = told(pynvml.nvmlDeviceGetPersistenceMode, handle)
    mig = told(pynvml.nvmlDeviceGetMigMode, handle)
    mode = told(pynvml.nvmlDeviceGetComputeMode, handle)
    nodes = told(pynvml.nvmlDeviceGetMemoryAffinity, handle, 1, pynvml.NVML_AFFINITY_SCOPE_NODE)
    num_words = -(-(os.cpu_count() or 1) // 64)
    return GpuState(
        index=index,
        name=str(pynvml.nvmlDeviceGetName(handle)),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        capability=told(pynvml.nvmlDeviceGetCudaComputeCapability, handle),
        bus_id=None if bus is None else _text(bus.busId),
        ecc=None if ecc is None else bool(ecc[0]),
        persistence=None if persistence is None else bool(persistence),
        mig=None if mig is None else bool(mig[0]),
        compute_mode=None if mode is None else _COMPUTE_MODES.get(mode),
        num_nvlinks=len(_active_nvlinks(pynvml, handle)),
        numa_node=next(iter(_bits(nodes)), None),
        cpus=tuple(_bits(told(pynvml.nvmlDeviceGetCpuAffinity, handle, num_words))),
        processes=_processes(pynvml, handle),
    )


def _processes(pynvml: Any, handle: Any) -> tuple[GpuProcess, ...]:
    found = told(pynvml.nvmlDeviceGetComputeRunningProcesses, handle) or ()
    return tuple(GpuProcess(int(each.pid), each.usedGpuMemory) for each in found)


def _active_nvlinks(pynvml: Any, handle: Any) -> list[int]:
    links = range(pynvml.NVML_NVLINK_MAX_LINKS)
    return [link for link in links if told(pynvml.nvmlDeviceGetNvLinkState, handle, link)]


def _links(pynvml: Any, handles: list[Any], states: tuple[GpuState, ...]) -> Iterator[GpuLink]:
    direct = [_direct_nvlinks(pynvml, handle) for handle in handles]
    for second, there in enumerate(handles):
        for first, here in enumerate(handles[:second]):
            road = told(pynvml.nvmlDeviceGetTopologyCommonAncestor, here, there)
            yield GpuLink(
                first,
                second,
                _nvlinks_between(pynvml, (here, there), (states[first], states[second]), direct),
                None if road is None else _ROADS.get(road),
                _peer_obstacle(pynvml, here, there),
            )


def _direct_nvlinks(pynvml: Any, handle: Any) -> list[str]:
    """The bus ids at the other ends of a GPU's links: other GPUs, or switches."""
    links = _active_nvlinks(pynvml, handle)
    ends = [told(pynvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link) for link in links]
    return [_text(end.busId) for end in ends if end is not None]


def _nvlinks_between(
    pynvml: Any, pair: tuple[Any, Any], states: tuple[GpuState, GpuState], direct: list[list[str]]
) -> int:
    """Links from one to the other; through switches every link of either leads to the other."""
    first, second = states
    if second.bus_id is not None and (count := direct[first.index].count(second.bus_id)):
        return count
    reached = told(pynvml.nvmlDeviceGetP2PStatus, *pair, _PEER_NVLINK)
    return min(first.num_nvlinks, second.num_nvlinks) if reached == 0 else 0


def _peer_obstacle(pynvml: Any, here: Any, there: Any) -> str | None:
    """Both ways, because pages may travel in both."""
    for pair in ((here, there), (there, here)):
        status = told(pynvml.nvmlDeviceGetP2PStatus, *pair, _PEER_READ)
        if status != 0:
            return _PEER_STATUS.get(-1 if status is None else status, "the driver does not say")
    return None


def _text(value: bytes | str) -> str:
    return (value.decode() if isinstance(value, bytes) else value).lower()


def _bits(words: Any) -> Iterator[int]:
    """The numbers of the bits that are set, in words of 64."""
    for place, word in enumerate(words or ()):
        yield from (64 * place + bit for bit in range(64) if int(word) >> bit & 1)
