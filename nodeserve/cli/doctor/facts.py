"""What `nodeserve doctor` knows about a machine: plain values, none of them judged.

`collect` fills them in, `judge` reads them; tests write them down.
"""

from dataclasses import dataclass, field

from nodeserve.nvml import Survey


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """/dev/shm."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What the operating system gives to this process."""

    python: str
    cores: tuple[int, ...]  # those it may run on
    num_cores: int  # all there are
    memory_bytes: int
    free_memory_bytes: int
    shared_memory: SharedMemory | None  # None: there is no /dev/shm
    locked_bytes: int | None  # RLIMIT_MEMLOCK; None: no limit
    open_files: int | None  # RLIMIT_NOFILE; None: no limit
    container: bool
    num_nvidia_devices: int  # on the PCI bus, whether a driver knows them or not


@dataclass(frozen=True, slots=True)
class Software:
    """What a worker could load; None: it is not there, or `failures` says why not."""

    native: str | None = None  # instruction set of the CPU kernels
    torch: str | None = None
    torch_cuda: str | None = None  # None: a CPU build
    torch_devices: int = 0
    torch_archs: tuple[str, ...] = ()  # "sm_90", "compute_90"; empty without a GPU
    triton: str | None = None
    attention: str | None = None  # what a common model's attention would run with on GPU 0
    extension_obstacle: str | None = None  # why nodeserve._cuda cannot be there at all
    extension_devices: int | None = None  # GPUs that it sees
    failures: dict[str, str] = field(default_factory=dict)  # part: how loading it failed


@dataclass(frozen=True, slots=True)
class Sockets:
    """Where `nodeserve start` would listen."""

    path: str | None
    obstacle: str | None  # why it cannot be made there
    listening_pid: int | None  # a server that is there already


@dataclass(frozen=True, slots=True)
class Outlook:
    """What `nodeserve start` would do with these settings and the demo model."""

    asked: str  # "auto", "cpu" or "cuda"
    device: str  # "cpu" or "cuda"
    layout: str | None
    gpu_obstacle: str | None  # why CUDA workers cannot run
    demo_model: str | None  # its name
    demo_model_obstacle: str | None
    notes: tuple[str, ...] = ()
    refusal: str | None = None  # why it would not start


@dataclass(frozen=True, slots=True)
class Facts:
    version: str  # of nodeserve
    machine: Machine
    gpus: Survey
    software: Software
    socket: Sockets
    outlook: Outlook
