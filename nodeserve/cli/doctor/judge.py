"""Rules: from facts to findings, with nothing else to look at.

A rule that concerns CUDA workers only is a problem where they should run, and no news elsewhere.
"""

from collections.abc import Iterator

from nodeserve.cli.doctor.facts import Facts, Software
from nodeserve.cli.doctor.findings import OK, PROBLEM, WARNING, Finding, dotted, ranges, size
from nodeserve.cli.doctor.judge_gpus import capable, judge_gpus, wants_gpus
from nodeserve.nvml import GpuState

MIN_SHM_BYTES = 16 << 20  # rings and semaphores of a small layout
ROOMY_SHM_BYTES = 1 << 30  # what a CPU worker takes for its pages by default
MIN_OPEN_FILES, ROOMY_OPEN_FILES = 256, 1024
DOCKER_SHM = "docker run --shm-size=4g (or --ipc=host)"


def judge(facts: Facts) -> list[Finding]:
    """All findings, by area."""
    return [
        *judge_gpus(facts),
        *judge_software(facts),
        *judge_machine(facts),
        *judge_start(facts),
    ]


def works(findings: list[Finding]) -> bool:
    """Nothing has to be repaired."""
    return all(finding.mark != PROBLEM for finding in findings)


# ---- software


def judge_software(facts: Facts) -> Iterator[Finding]:
    software = facts.software
    if problem := software.failures.get("probe"):
        text = f"python -m nodeserve.worker.probe {problem}"
        yield _software("probe", PROBLEM, text, "run it by hand and see what it prints")
    yield _native(software)
    yield _torch(facts)
    yield from _torch_kernels(facts)
    yield _triton(facts)
    yield _extension(facts)
    yield from _attention(facts)


def _software(check: str, mark: str, text: str, advice: str = "") -> Finding:
    return Finding("software", check, mark, text, advice)


def _native(software: Software) -> Finding:
    """Also GPU workers need it: rings are in the same extension."""
    if problem := software.failures.get("native"):
        text = f"nodeserve._host cannot be loaded: {problem}"
        return _software("native", PROBLEM, text, "rebuild: pip install --force-reinstall .")
    if software.native is None:
        return _software("native", WARNING, "CPU kernels: not known")
    text = f"CPU kernels: native {software.native}"
    if software.native == "generic":
        return _software("native", WARNING, text, "this CPU has no AVX2: expect slow CPU workers")
    return _software("native", OK, text)


def _torch(facts: Facts) -> Finding:
    software, gpus = facts.software, facts.gpus
    if problem := software.failures.get("torch"):
        advice = "install torch 2.9 or newer for this Python"
        return _software("torch", PROBLEM, f"torch cannot be loaded: {problem}", advice)
    if software.torch is None:
        return _software("torch", WARNING, "torch: not known")
    build = f"built for CUDA {software.torch_cuda}" if software.torch_cuda else "a CPU build"
    text = f"torch {software.torch}, {build}"
    if not wants_gpus(facts):
        return _software("torch", OK, text)
    if software.torch_cuda is None:
        advice = "install a torch built for the driver's CUDA"
        return _software("torch", PROBLEM, f"{text}: CUDA workers cannot run", advice)
    if gpus.cuda is not None and int(software.torch_cuda.partition(".")[0]) > gpus.cuda[0]:
        text = f"{text}; the driver runs CUDA {dotted(gpus.cuda)} and older"
        return _software("torch", PROBLEM, text, "install a newer driver or a torch for its CUDA")
    if software.torch_devices == 0:
        advice = (
            "look at CUDA_VISIBLE_DEVICES, and on machines with NVSwitch at nvidia-fabricmanager"
        )
        return _software("torch", PROBLEM, f"{text}; it sees no GPU", advice)
    return _software("torch", OK, text)


def _torch_kernels(facts: Facts) -> Iterator[Finding]:
    """A torch without kernels for a GPU loads, and fails at the first operation."""
    archs = facts.software.torch_archs
    without = [gpu for gpu in capable(facts.gpus) if archs and not runs_on(archs, gpu)]
    if without and wants_gpus(facts):
        text = f"torch has no kernels for GPU {ranges(tuple(gpu.index for gpu in without))}"
        advice = f"install a torch built for it; this one has {', '.join(archs)}"
        yield _software("torch-kernels", PROBLEM, text, advice)


def runs_on(archs: tuple[str, ...], gpu: GpuState) -> bool:
    """Binaries run on later minor versions of the same major one, PTX on all later ones."""
    if gpu.capability is None:
        return True
    for arch in archs:
        kind, _, digits = arch.partition("_")
        number = digits.rstrip("abcdefghijklmnopqrstuvwxyz")
        exact, (major, minor) = number != digits, (int(number[:-1]), int(number[-1]))
        if exact and (major, minor) != gpu.capability:  # sm_90a: of that GPU alone
            continue
        if (major, minor) <= gpu.capability and (kind == "compute" or major == gpu.capability[0]):
            return True
    return False


def _triton(facts: Facts) -> Finding:
    software, wanted = facts.software, wants_gpus(facts)
    if problem := software.failures.get("triton"):
        text = f"triton cannot be loaded: {problem}"
        return _software("triton", PROBLEM if wanted else OK, text, _if(wanted, "reinstall it"))
    if software.triton is None:
        text = "triton is not installed" + _if(not wanted, ": only CUDA workers need it")
        advice = _if(wanted, "pip install triton (torch's CUDA builds bring it)")
        return _software("triton", PROBLEM if wanted else OK, text, advice)
    return _software("triton", OK, f"triton {software.triton}")


def _extension(facts: Facts) -> Finding:
    software, wanted = facts.software, wants_gpus(facts)
    if software.extension_obstacle is not None:
        missing, advice = reason_and_advice(software.extension_obstacle)
        text = missing + _if(not wanted, ": only CUDA workers need it")
        mark = PROBLEM if wanted else OK
        return _software("extension", mark, text, _if(wanted, advice))
    if not wanted:  # without a driver it finds none, and need not
        return _software("extension", OK, "nodeserve._cuda is built: only CUDA workers need it")
    if problem := software.failures.get("extension"):
        text = f"nodeserve._cuda is built, but: {problem}"
        advice = "the driver and the CUDA that it was built with must fit"
        return _software("extension", PROBLEM, text, advice)
    count, text = software.extension_devices or 0, "nodeserve._cuda is built"
    if count < len(facts.gpus.gpus):
        text += f", and sees {count} of {len(facts.gpus.gpus)} GPUs"
        mark = WARNING if count else PROBLEM
        return _software("extension", mark, text, "look at CUDA_VISIBLE_DEVICES")
    return _software("extension", OK, text)


def _attention(facts: Facts) -> Iterator[Finding]:
    """Only where there is a GPU to choose for."""
    software = facts.software
    if problem := software.failures.get("attention"):
        mark = PROBLEM if wants_gpus(facts) else OK
        advice = _if(mark == PROBLEM, "choose another with --attention-backend")
        yield _software("attention", mark, f"attention cannot be chosen: {problem}", advice)
    elif software.attention is not None:
        text = f"attention: {software.attention}"
        if software.attention.startswith("reference") and wants_gpus(facts):
            advice = "install triton: the reference is slow"
            yield _software("attention", WARNING, text, advice)
        else:
            yield _software("attention", OK, text)


def reason_and_advice(obstacle: str) -> tuple[str, str]:
    """An obstacle in its two halves: what is the case; (or :) what to do."""
    reason, _, advice = obstacle.partition("; " if "; " in obstacle else ": ")
    return reason, advice


def _if(condition: bool, text: str) -> str:
    return text if condition else ""


# ---- the machine


def judge_machine(facts: Facts) -> Iterator[Finding]:
    machine = facts.machine
    cores = f"cores: {len(machine.cores)} of {machine.num_cores} may be used"
    yield _machine("cores", OK, f"{cores}; Python {machine.python}")
    free, total = size(machine.free_memory_bytes), size(machine.memory_bytes)
    yield _machine("memory", OK, f"memory: {free} of {total} free")
    yield _shared_memory(facts)
    yield _open_files(machine.open_files)
    locked = "no limit" if machine.locked_bytes is None else size(machine.locked_bytes)
    yield _machine("locked-memory", OK, f"locked memory (ulimit -l): {locked}")


def _machine(check: str, mark: str, text: str, advice: str = "") -> Finding:
    return Finding("machine", check, mark, text, advice)


def _shared_memory(facts: Facts) -> Finding:
    """Rings of every worker, pages of CPU workers, and of GPU workers without peer access."""
    shm = facts.machine.shared_memory
    advice = DOCKER_SHM if facts.machine.container else "mount -o remount,size=50% /dev/shm"
    if shm is None:
        text = "/dev/shm is not there: rings and pages live in it"
        return _machine("shared-memory", PROBLEM, text, "mount a tmpfs on /dev/shm")
    text = f"/dev/shm: {size(shm.free_bytes)} of {size(shm.total_bytes)} free"
    if shm.free_bytes < MIN_SHM_BYTES:
        return _machine("shared-memory", PROBLEM, f"{text}: no room for rings", advice)
    if shm.free_bytes < ROOMY_SHM_BYTES:
        text = f"{text}: few pages fit that CPU workers or handoffs through the host need"
        return _machine("shared-memory", WARNING, text, advice)
    return _machine("shared-memory", OK, text)


def _open_files(limit: int | None) -> Finding:
    text = f"open files (ulimit -n): {'no limit' if limit is None else limit}"
    if limit is not None and limit < ROOMY_OPEN_FILES:
        mark = PROBLEM if limit < MIN_OPEN_FILES else WARNING
        advice = "ulimit -n 65536: each client and each worker takes some"
        return _machine("open-files", mark, text, advice)
    return _machine("open-files", OK, text)


# ---- what a start would do


def judge_start(facts: Facts) -> Iterator[Finding]:
    yield _model(facts)
    yield _socket(facts)
    outlook = facts.outlook
    if outlook.refusal is not None:
        text = f"`nodeserve start` refuses: {outlook.refusal}"
        yield _start("start", PROBLEM, text, "repair what is marked above, or do what it says")
        return
    for note in outlook.notes:
        yield _start("note", WARNING, note)
    yield _start("start", OK, f"`nodeserve start` runs {what_runs(facts)}")


def _start(check: str, mark: str, text: str, advice: str = "") -> Finding:
    return Finding("start", check, mark, text, advice)


def _model(facts: Facts) -> Finding:
    if facts.outlook.demo_model is None:
        text, advice = reason_and_advice(str(facts.outlook.demo_model_obstacle))
        return _start("demo-model", WARNING, text, advice)
    return _start("demo-model", OK, f"demo model: {facts.outlook.demo_model}")


def _socket(facts: Facts) -> Finding:
    socket = facts.socket
    if socket.obstacle is not None:
        text = f"socket {socket.path or ''}: {socket.obstacle}"
        return _start("socket", PROBLEM, text, "choose another with --socket or NODESERVE_SOCKET")
    if socket.listening_pid is not None:
        text = f"socket {socket.path}: a server is running (pid {socket.listening_pid})"
        return _start("socket", OK, text)
    return _start("socket", OK, f"socket: {socket.path}")


def what_runs(facts: Facts) -> str:
    """ "CPU workers: native avx512_bf16 kernels, layout 1p1d"."""
    layout = f"layout {facts.outlook.layout}"
    if facts.outlook.device == "cuda":
        return f"CUDA workers: {layout}"
    return f"CPU workers: native {facts.software.native or 'unknown'} kernels, {layout}"
