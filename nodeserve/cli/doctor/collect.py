"""Looks at the machine. Nothing is judged here; what cannot be read is None or a reason."""

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nodeserve import __version__, nvml
from nodeserve.cli.doctor.facts import Facts, Machine, Outlook, SharedMemory, Sockets, Software
from nodeserve.cli.launch import VISIBLE_GPUS
from nodeserve.cli.show import listening_pid
from nodeserve.errors import ConfigError, ModelError
from nodeserve.gpus import Gpus, extension_obstacle, find_gpus
from nodeserve.socket_path import socket_path

PROBE_COMMAND = (sys.executable, "-m", "nodeserve.worker.probe")
PROBE_TIMEOUT_S = 120.0  # torch from a cold disk takes most of a minute
NVIDIA_VENDOR, DISPLAY_CLASSES = "0x10de", ("0x0300", "0x0302")  # VGA and 3D controllers
CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")


def collect(device: str) -> Facts:
    """Everything; takes as long as loading torch in another process."""
    return Facts(
        version=__version__,
        machine=machine(),
        gpus=nvml.survey(),
        software=software(),
        socket=sockets(os.environ),
        outlook=outlook(device),
    )


# ---- the operating system


def machine() -> Machine:
    memory = meminfo(Path("/proc/meminfo").read_text())
    return Machine(
        python=platform.python_version(),
        cores=tuple(sorted(os.sched_getaffinity(0))),
        num_cores=os.cpu_count() or 1,
        memory_bytes=memory["MemTotal"],
        free_memory_bytes=memory["MemAvailable"],
        shared_memory=shared_memory(Path("/dev/shm")),
        locked_bytes=soft_limit(resource.RLIMIT_MEMLOCK),
        open_files=soft_limit(resource.RLIMIT_NOFILE),
        container=any(Path(mark).exists() for mark in CONTAINER_MARKS),
        num_nvidia_devices=num_nvidia_devices(Path("/sys/bus/pci/devices")),
    )


def meminfo(text: str) -> dict[str, int]:
    """Bytes by name."""
    lines = (line.partition(":") for line in text.splitlines())
    return {name: 1024 * int(rest.split()[0]) for name, _, rest in lines if "kB" in rest}


def shared_memory(path: Path) -> SharedMemory | None:
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None
    return SharedMemory(usage.total, usage.free)


def soft_limit(number: int) -> int | None:
    soft, _ = resource.getrlimit(number)
    return None if soft == resource.RLIM_INFINITY else soft


def num_nvidia_devices(folder: Path) -> int:
    """Without any driver the bus still knows them."""
    return sum(
        read_word(device / "vendor") == NVIDIA_VENDOR
        and read_word(device / "class").startswith(DISPLAY_CLASSES)
        for device in (folder.iterdir() if folder.is_dir() else ())
    )


def read_word(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


# ---- what a worker could load


def software(
    command: Sequence[str] = PROBE_COMMAND, timeout_s: float = PROBE_TIMEOUT_S
) -> Software:
    """Asks a process of its own, which may die or hang without harm."""
    answers, failures = run_probe(command, timeout_s)
    torch = answers.get("torch", {})
    return Software(
        native=answers.get("native", {}).get("isa"),
        torch=torch.get("version"),
        torch_cuda=torch.get("cuda"),
        torch_devices=torch.get("num_devices", 0),
        torch_archs=tuple(torch.get("archs", ())),
        triton=answers.get("triton", {}).get("version"),
        attention=answers.get("attention", {}).get("backend"),
        extension_obstacle=extension_obstacle(),
        extension_devices=answers.get("extension", {}).get("num_devices"),
        failures=failures,
    )


def run_probe(
    command: Sequence[str], timeout_s: float
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The parts' answers, and how the others failed."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s
        )
        end, output, said = describe_exit(done.returncode), done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        end, output, said = (
            f"took more than {timeout_s:g} s",
            late.stdout or b"",
            late.stderr or b"",
        )
    answers: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    begun = None
    for line in probe_lines(output):
        begun = line["part"]
        if "value" in line:
            answers[begun] = line["value"]
        elif "error" in line:
            failures[begun] = line["error"]
    if end is not None:
        last = said.decode(errors="replace").strip().rpartition("\n")[2]
        part = begun if begun and begun not in answers else "probe"
        failures.setdefault(part, f"{end}{': ' + last if last else ''}")
    return answers, failures


def probe_lines(output: bytes) -> list[Mapping[str, Any]]:
    """Ours among whatever else libraries print when they are loaded."""
    lines = [
        line for line in output.decode(errors="replace").splitlines() if line[:9] == '{"part": '
    ]
    return [json.loads(line) for line in lines]


def describe_exit(code: int) -> str | None:
    if code < 0:
        return f"died of signal {-code}"
    return f"ended with exit code {code}" if code else None


# ---- what `nodeserve start` would do


def sockets(environ: Mapping[str, str]) -> Sockets:
    try:
        path = socket_path(None, environ)
    except ConfigError as problem:
        return Sockets(None, str(problem), None)
    return Sockets(str(path), folder_obstacle(path.parent), listening_pid(path))


def folder_obstacle(folder: Path) -> str | None:
    """Why no socket can be made in a folder. One that is made on demand needs its parent only."""
    wanted = folder if folder.exists() or folder.name != private_name() else folder.parent
    if not wanted.is_dir():
        return f"the folder {wanted} does not exist"
    return None if os.access(wanted, os.W_OK | os.X_OK) else f"{wanted} cannot be written to"


def private_name() -> str:
    return f"nodeserve-{os.getuid()}"


def outlook(device: str) -> Outlook:
    """By the very code that `start` runs, so that both always agree."""
    from nodeserve.checkpoint import resolve as resolve_checkpoint
    from nodeserve.config import EngineConfig
    from nodeserve.coordinator import placement

    gpus = find_gpus().seen_through(os.environ.get(VISIBLE_GPUS))
    config = EngineConfig(device=device)
    on_gpus = device == "cuda" or (device == "auto" and gpus.usable)
    known = (device, "cuda" if on_gpus else "cpu")
    try:
        checkpoint = resolve_checkpoint(None)
    except ModelError as problem:
        return _without_model(config, gpus, known, str(problem))
    model = checkpoint.served_name
    try:
        plan = placement.resolve(config, checkpoint, gpus)
    except ConfigError as problem:
        return Outlook(*known, None, gpus.obstacle, model, None, refusal=str(problem))
    return Outlook(*known, str(plan.layout), gpus.obstacle, model, None, plan.notes)


def _without_model(config: Any, gpus: Gpus, known: tuple[str, str], obstacle: str) -> Outlook:
    """Devices and layout are known without a model; its memory is not."""
    from nodeserve.coordinator import placement, places

    place = places.place_on_gpus if known[1] == "cuda" else places.place_on_cpus
    try:
        placement.check_device(config, gpus)
        placed = place(config, gpus)
    except ConfigError as problem:
        return Outlook(*known, None, gpus.obstacle, None, obstacle, refusal=str(problem))
    return Outlook(*known, str(placed.layout), gpus.obstacle, None, obstacle, placed.notes)
