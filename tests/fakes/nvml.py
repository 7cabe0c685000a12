"""A management library of GPUs that are not there: stands where `pynvml`'s functions are."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

READ, NVLINK = 0, 2  # what NVML calls these capabilities
GIB = 1 << 30


@dataclass
class FakeGpu:
    """None is what a GPU does not tell."""

    name: str = "NVIDIA H100 80GB HBM3"
    total_bytes: int = 80 * GIB
    free_bytes: int = 79 * GIB
    capability: tuple[int, int] = (9, 0)
    nvlinks: list[str] = field(default_factory=list)  # at each link's other end: a bus id
    ecc: bool | None = True
    persistence: bool | None = True
    mig: bool | None = False
    compute_mode: int = 0
    cpus: int = 0b1111  # bits
    node: int = 0
    processes: dict[int, int | None] = field(default_factory=dict)  # pid: bytes


def bus_id(index: int) -> str:
    return f"00000000:{index + 1:02x}:00.0"


def all_to_all(first: int, second: int) -> int:
    return 0


def no_peers(first: int, second: int) -> int:
    return 5  # NVML_P2P_STATUS_NOT_SUPPORTED


@dataclass
class FakeNvml:
    """One machine's driver; `install` puts it in place until the test ends."""

    gpus: list[FakeGpu] = field(default_factory=list)
    driver: str = "580.65.06"
    cuda: int | None = 13000
    peer: Callable[[int, int], int] = all_to_all
    road: int = 50
    init_error: int | None = None
    list_error: int | None = None
    open_sessions: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in dir(self):
            if name.startswith("nvml"):
                monkeypatch.setattr(pynvml, name, getattr(self, name))

    def nvmlInit(self) -> None:
        fail_with(self.init_error)
        self.open_sessions += 1

    def nvmlShutdown(self) -> None:
        self.open_sessions -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return self.driver

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return int(known(self.cuda))

    def nvmlDeviceGetCount(self) -> int:
        fail_with(self.list_error)
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}0000000-aaaa"

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.gpus[handle].name

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        gpu = self.gpus[handle]
        return SimpleNamespace(total=gpu.total_bytes, free=gpu.free_bytes)

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return self.gpus[handle].capability

    def nvmlDeviceGetPciInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(busId=bus_id(handle).upper().encode())

    def nvmlDeviceGetEccMode(self, handle: int) -> list[int]:
        return [int(known(self.gpus[handle].ecc))] * 2

    def nvmlDeviceGetPersistenceMode(self, handle: int) -> int:
        return int(known(self.gpus[handle].persistence))

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        return [int(known(self.gpus[handle].mig))] * 2

    def nvmlDeviceGetComputeMode(self, handle: int) -> int:
        return self.gpus[handle].compute_mode

    def nvmlDeviceGetMemoryAffinity(self, handle: int, num_words: int, scope: int) -> list[int]:
        assert (num_words, scope) == (1, 0)
        return [1 << self.gpus[handle].node]

    def nvmlDeviceGetCpuAffinity(self, handle: int, num_words: int) -> list[int]:
        assert num_words >= 1
        return [self.gpus[handle].cpus]

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        found = self.gpus[handle].processes
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in found.items()]

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        if not self.gpus[handle].nvlinks:
            fail_with(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return int(link < len(self.gpus[handle].nvlinks))

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: int, link: int) -> SimpleNamespace:
        return SimpleNamespace(busId=self.gpus[handle].nvlinks[link].encode())

    def nvmlDeviceGetTopologyCommonAncestor(self, first: int, second: int) -> int:
        return self.road

    def nvmlDeviceGetP2PStatus(self, first: int, second: int, index: int) -> int:
        assert type(index) is int and index in (READ, NVLINK)
        if index == NVLINK:
            both = self.gpus[first].nvlinks and self.gpus[second].nvlinks
            return 0 if both else 5
        return self.peer(first, second)


def known(value: Any) -> Any:
    if value is None:
        fail_with(pynvml.NVML_ERROR_NOT_SUPPORTED)
    return value


def fail_with(code: int | None) -> None:
    if code is not None:
        raise pynvml.NVMLError(code)


def no_driver() -> FakeNvml:
    return FakeNvml(init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


def one_h200() -> FakeNvml:
    gpu = FakeGpu("NVIDIA H200", 141 * GIB, 140 * GIB, nvlinks=["switch"] * 18)
    return FakeNvml([gpu])


def eight_h100() -> FakeNvml:
    """Every link leads to a switch; four GPUs at each of two sockets."""
    gpus = [
        FakeGpu(nvlinks=["00000000:f0:00.0"] * 18, cpus=0xF << 4 * (i // 4), node=i // 4)
        for i in range(8)
    ]
    return FakeNvml(gpus)


def four_consumer() -> FakeNvml:
    """No links, no peer access, and less is told."""
    card = {"name": "NVIDIA GeForce RTX 4090", "total_bytes": 24 * GIB, "free_bytes": 23 * GIB}
    gpus = [FakeGpu(**card, capability=(8, 9), ecc=None, mig=None) for _ in range(4)]  # type: ignore[arg-type]
    return FakeNvml(gpus, peer=no_peers, road=30)
