"""Rules about the driver, the GPUs and the roads between them."""

from collections.abc import Callable, Iterator

from nodeserve.cli.doctor.facts import Facts
from nodeserve.cli.doctor.findings import OK, PROBLEM, WARNING, Finding, dotted, ranges, size
from nodeserve.gpus import MIN_CAPABILITY, driver_obstacle
from nodeserve.nvml import GpuState, Survey

MIN_FREE_SHARE = 0.5  # below this somebody else's memory decides how many requests fit
AREA = "GPUs"


def capable(gpus: Survey) -> tuple[GpuState, ...]:
    """Those new enough for our kernels."""
    return tuple(x for x in gpus.gpus if x.capability is None or x.capability >= MIN_CAPABILITY)


def wants_gpus(facts: Facts) -> bool:
    """CUDA workers are what should run here: what keeps them from it is to be repaired."""
    asked = facts.outlook.asked
    return asked == "cuda" or (asked == "auto" and bool(capable(facts.gpus)))


def judge_gpus(facts: Facts) -> Iterator[Finding]:
    if facts.gpus.failure is not None:
        yield _without_driver(facts)
        return
    yield _driver(facts)
    kinds: dict[str, list[int]] = {}
    for gpu in facts.gpus.gpus:
        kinds.setdefault(described(gpu), []).append(gpu.index)
    for words, numbers in kinds.items():
        yield Finding(AREA, "gpu", OK, f"GPU {ranges(tuple(numbers))}: {words}")
    for gpu in facts.gpus.gpus if facts.outlook.asked != "cpu" else ():
        yield from _memory(gpu)
    if facts.outlook.asked != "cpu":
        yield from _modes(facts.gpus)
        yield from _peers(facts.gpus)
        yield from _cores(facts)


def _without_driver(facts: Facts) -> Finding:
    count = facts.machine.num_nvidia_devices
    if count:
        text = f"{facts.gpus.failure}, yet NVIDIA devices are on the PCI bus ({count})"
        advice = "install the NVIDIA driver; in a container, start it with --gpus all"
        return Finding(AREA, "driver", PROBLEM if wants_gpus(facts) else WARNING, text, advice)
    if wants_gpus(facts):
        advice = "use --device cpu, or a machine with an NVIDIA GPU and its driver"
        return Finding(AREA, "driver", PROBLEM, str(facts.gpus.failure), advice)
    return Finding(AREA, "driver", OK, f"{facts.gpus.failure}: CPU workers need none")


def _driver(facts: Facts) -> Finding:
    gpus = facts.gpus
    cuda = "an unknown CUDA" if gpus.cuda is None else f"CUDA {dotted(gpus.cuda)}"
    text = f"driver {gpus.driver or 'of unknown version'}, runs {cuda} and older"
    if not gpus.gpus:
        advice = "see whether nvidia-smi lists it; in a container, start it with --gpus all"
        mark = PROBLEM if wants_gpus(facts) else WARNING
        return Finding(AREA, "driver", mark, f"{text}; it sees no GPU", advice)
    if wants_gpus(facts) and driver_obstacle(gpus.cuda):
        advice = "install driver 570 or newer (580 for torch built with CUDA 13)"
        return Finding(AREA, "driver", PROBLEM, f"{text}: too old for CUDA workers", advice)
    return Finding(AREA, "driver", OK, text)


def described(gpu: GpuState) -> str:
    """A GPU in one line; what it does not tell is left out."""
    memory = f"{gpu.free_bytes / 2**30:.1f} of {gpu.total_bytes / 2**30:.1f} GiB free"
    parts = [gpu.name, memory]
    if gpu.capability is not None:
        parts.append(f"compute capability {dotted(gpu.capability)}")
    if gpu.ecc is not None:
        parts.append(f"ECC {'on' if gpu.ecc else 'off'}")
    if gpu.num_nvlinks:
        parts.append(f"{gpu.num_nvlinks} NVLinks")
    if gpu.numa_node is not None:
        parts.append(f"NUMA node {gpu.numa_node}")
    return ", ".join(parts)


def _memory(gpu: GpuState) -> Iterator[Finding]:
    if gpu.free_bytes >= MIN_FREE_SHARE * gpu.total_bytes:
        return
    users = ", ".join(
        f"{process.pid}" + (f" ({size(process.used_bytes)})" if process.used_bytes else "")
        for process in gpu.processes
    )
    text = f"GPU {gpu.index}: only {size(gpu.free_bytes)} free; processes: {users or 'not told'}"
    advice = "end them, choose other GPUs with --gpus, or serve with what is left"
    yield Finding(AREA, "gpu-memory", WARNING, text, advice)


_MODES: tuple[tuple[str, str, Callable[[GpuState], bool], str, str], ...] = (
    (
        *("gpu-capability", WARNING),
        lambda gpu: gpu.capability is not None and gpu.capability < MIN_CAPABILITY,
        f"older than compute capability {dotted(MIN_CAPABILITY)}",
        "leave it out with --gpus: the kernels do not run on it",
    ),
    (
        *("gpu-mode", PROBLEM),
        lambda gpu: gpu.compute_mode == "prohibited",
        "compute mode forbids every CUDA process",
        "nvidia-smi -c DEFAULT",
    ),
    (
        *("gpu-mode", WARNING),
        lambda gpu: gpu.compute_mode == "exclusive",
        "compute mode allows one process: no --gpus 0,0",
        "nvidia-smi -c DEFAULT",
    ),
    (
        *("gpu-mig", WARNING),
        lambda gpu: gpu.mig is True,
        "cut into MIG instances, which have no peer access",
        "nvidia-smi -mig 0, or use the instance as a GPU of its own",
    ),
    (
        *("gpu-persistence", WARNING),
        lambda gpu: gpu.persistence is False,
        "persistence mode is off: the first start waits for the driver to load",
        "nvidia-smi -pm 1",
    ),
)


def _modes(gpus: Survey) -> Iterator[Finding]:
    """One line for all GPUs that are alike."""
    for check, mark, holds, text, advice in _MODES:
        if numbers := tuple(gpu.index for gpu in gpus.gpus if holds(gpu)):
            yield Finding(AREA, check, mark, f"GPU {ranges(numbers)}: {text}", advice)


def _peers(gpus: Survey) -> Iterator[Finding]:
    """Whether pages can go from GPU to GPU."""
    if not gpus.links:
        return
    apart = [link for link in gpus.links if link.peer_obstacle is not None]
    total = f"{len(gpus.links)} pair{'s' if len(gpus.links) > 1 else ''} of GPUs"
    if not apart:
        counts = sorted({link.num_nvlinks for link in gpus.links})
        road = "PCIe" if counts[-1] == 0 else "NVLink" if counts[0] else "NVLink and PCIe"
        yield Finding(AREA, "peer-access", OK, f"peer access: {total}, all over {road}")
        return
    reasons = ", ".join(dict.fromkeys(str(link.peer_obstacle) for link in apart))
    text = (
        f"peer access: missing for {len(apart)} of {total} ({reasons}): handoffs between these"
        " go through pinned host memory"
    )
    advice = "consumer cards have none; on others look at ACS and IOMMU settings"
    yield Finding(AREA, "peer-access", WARNING, text, advice)


def _cores(facts: Facts) -> Iterator[Finding]:
    """The steps of a GPU are launched from a core near it, where that is allowed."""
    ours = set(facts.machine.cores)
    far = tuple(gpu.index for gpu in facts.gpus.gpus if gpu.cpus and not ours & set(gpu.cpus))
    if far:
        text = f"GPU {ranges(far)}: no core near it may be used ({ranges(facts.machine.cores)} may)"
        yield Finding(AREA, "gpu-cores", WARNING, text, "widen the process's core set (taskset)")
