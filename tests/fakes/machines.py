"""Machines for the doctor's rules: facts written down, all well unless a test says otherwise."""

from dataclasses import replace
from typing import Any

import pytest

from nodeserve.cli.doctor.facts import Facts, Machine, Outlook, SharedMemory, Sockets, Software
from nodeserve.nvml import Survey, survey
from tests.fakes.nvml import GIB, FakeNvml

MACHINE = Machine(
    python="3.12.3",
    cores=tuple(range(8)),
    num_cores=8,
    memory_bytes=64 * GIB,
    free_memory_bytes=60 * GIB,
    shared_memory=SharedMemory(32 * GIB, 32 * GIB),
    locked_bytes=None,
    open_files=65536,
    container=False,
    num_nvidia_devices=0,
)
CPU_SOFTWARE = Software(
    native="avx512_bf16",
    torch="2.11.0+cpu",
    extension_obstacle="nodeserve._cuda is not built: install with the CUDA toolkit's nvcc",
)
SOCKET = Sockets("/run/user/1000/nodeserve.sock", None, None)
NO_GPUS = "no NVIDIA driver answers (NVML Shared Library Not Found)"


def cuda_software(num_devices: int) -> Software:
    return Software(
        native="avx512_bf16",
        torch="2.11.0+cu130",
        torch_cuda="13.0",
        torch_devices=num_devices,
        torch_archs=("sm_80", "sm_90", "sm_100", "compute_120"),
        triton="3.6.0",
        attention="triton (flash-attn: not installed)",
        extension_devices=num_devices,
    )


def cpu_machine(asked: str = "auto") -> Facts:
    """No GPU, and none missed."""
    return Facts(
        version="0.1.0",
        machine=MACHINE,
        gpus=Survey(failure=NO_GPUS),
        software=CPU_SOFTWARE,
        socket=SOCKET,
        outlook=Outlook(asked, "cpu", "1p1d", NO_GPUS, "SmolLM2-135M-Instruct", None),
    )


def gpu_machine(monkeypatch: pytest.MonkeyPatch, fake: FakeNvml, asked: str = "auto") -> Facts:
    """What the fake driver tells, and software that fits."""
    with monkeypatch.context() as patch:
        fake.install(patch)
        found = survey()
    count = len(found.gpus)
    half = f"{count // 2}p{count - count // 2}d" if count > 1 else "1m"
    device = "cpu" if asked == "cpu" else "cuda"
    return Facts(
        version="0.1.0",
        machine=replace(MACHINE, num_nvidia_devices=count),
        gpus=found,
        software=cuda_software(count),
        socket=SOCKET,
        outlook=Outlook(asked, device, half, None, "SmolLM2-135M-Instruct", None),
    )


def changed(facts: Facts, part: str, **values: Any) -> Facts:
    """The same with some values of one part replaced."""
    return replace(facts, **{part: replace(getattr(facts, part), **values)})
