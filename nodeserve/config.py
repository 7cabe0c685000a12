"""Settings: frozen, built once, resolved once."""

import json
import math
import re
from dataclasses import asdict, dataclass

from nodeserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched; `kind` says which of the other fields count.

    "linear" divides every frequency by `factor`; "llama3" follows Llama 3.1's rule, from `factor`
    and the three numbers below it; "factors" divides frequency i by `frequency_factors[i]`, of
    which there are head_dim / 2 (GGUF files carry the result of the rule, not its numbers).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    frequency_factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a decoder looks like, whatever file format said so. Read without torch."""

    architecture: str  # "llama", "mistral", "qwen2" or "qwen3"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False  # biases on the q, k and v projections
    qk_norm: bool = False  # RMS norm over head_dim on q and k, before the rotation
    sliding_window: int | None = None  # tokens a query sees, itself included; None: all
    first_window_layer: int = 0  # layers before this one see all tokens even with a window
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def window_of(self, layer: int) -> int | None:
        """Tokens that a query of this layer sees, itself included; None: all."""
        return self.sliding_window if layer >= self.first_window_layer else None

    @property
    def num_weights(self) -> int:
        """Numbers in all its matrices; the rest does not count beside them."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * self.hidden_size
        return embeddings + self.num_layers * layer

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of K and V that one token takes over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * dtype_bytes


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What `nodeserve start` was asked for. `None` and "auto" are resolved once, in `resolve`."""

    model: str | None = None  # folder, .gguf file or hub name; None: the embedded demo model
    # None: 1p1d with two devices or more, else 1m; auto: planned before anything starts
    layout: str | None = None
    gpus: str | None = None
    device: str = "auto"  # auto, cuda, cpu, sim
    socket: str | None = None
    socket_mode: str | None = None  # octal, such as 660; None: 600, or 660 with a group
    socket_group: str | None = None  # name or number; None: as the system gives it
    allow_users: str | None = None  # names or numbers with commas; None: whom the mode lets in
    max_connections: int = 1024
    max_connection_reqs: int = 4096  # open at once on one connection
    max_connection_rate: float | None = None  # requests a second on one connection; None: any
    startup_timeout: float | None = None  # seconds until all workers are ready; None: by the model
    drain_timeout: float = 30.0  # seconds that running requests get when the server is to stop
    log_level: str = "info"  # one of log.LEVELS
    log_format: str = "text"  # one of log.STYLES
    http: str | None = None  # where gateways listen, HOST:PORT or unix:PATH; None: there are none
    http_workers: int = 1
    api_key_file: str | None = None  # of the gateways
    tool_call_parser: str | None = None  # how the model writes calls; None: by its chat template
    max_model_len: int | None = None  # tokens, prompt and output; None: the model's own
    block_size: int = 16  # tokens a KV block
    kv_memory: int | None = None  # bytes of KV pages per worker; None: from free memory
    max_num_seqs: int | None = None  # sequences in one decode step; None: what suits the device
    max_num_batched_tokens: int | None = None  # tokens in one step; None: what fills the device
    max_num_queued_reqs: int = 4096  # requests that wait before prefill; more are refused
    max_num_queued_tokens: int = 1 << 22  # of their prompts: as many requests of 1024 tokens
    slo: str | None = None  # of requests that bring none, such as ttft=500ms,tpot=50ms
    on_overload: str = "reject"  # what becomes of requests whose SLO cannot be met: reject, queue
    admission: str = "staggered"  # one of policy.units.ADMISSIONS
    window: str = "auto"  # interval between departures: auto, off, or milliseconds
    window_k: float = 1.0  # an automatic interval is this times (pass + dead time) / instances
    decode_allocation: str = "cost"  # one of policy.units.DECODE_ALLOCATIONS
    step_timeout: float | None = None  # seconds that make a worker hung; None: from its steps
    max_restarts: int = 5  # of an instance within ten minutes; one more death takes it out
    restart_delay: float = 0.5  # seconds before the first restart; each further one doubles it
    dtype: str = "auto"  # auto, bfloat16, float16, float32
    served_model_name: str | None = None
    load_format: str = (
        "auto"  # auto: the checkpoint's weights; dummy: random ones from a fixed seed
    )
    workload: str | None = None  # that layout "auto" is planned for
    # For simulated devices, and to plan with.
    profile: str | None = None  # whose passes are timed: a name that profile_store knows
    seed: int = 0  # of the noise on their durations
    # The rest is for GPUs only.
    gpu_memory_utilization: float = 0.9  # share of a GPU's memory for weights, pages, activations
    attention_backend: str = "auto"  # auto, flash-attn, torch, triton, reference
    handoff: str = "auto"  # auto: device to device where the GPUs allow it; ipc; host
    enforce_eager: bool = False  # no CUDA graphs


@dataclass(frozen=True, slots=True)
class Simulated:
    """What a worker without a model is told instead."""

    profile: str
    seed: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """All that a worker process is told at its start; travels as JSON on its command line."""

    index: int
    role: str
    device: str  # "cpu", "cuda" or "sim"
    model: str  # resolved path of the checkpoint
    dtype: str  # "bfloat16", "float16" or "float32"
    max_model_len: int
    block_size: int
    kv_memory: int | None  # bytes; None: what is free once the weights are there (GPUs only)
    max_num_seqs: int
    max_num_batched_tokens: int
    cpus: tuple[int, ...]  # cores to run on; the first is the step loop's
    num_threads: int
    parent_pid: int  # the coordinator's; the worker dies with it
    door_s: float  # how long a pass may be held for a Departure at most; 0: never
    idle_wait_s: float  # an idle worker gives a sign of life so often
    pages_fd: int  # inherited descriptor of this worker's page pool, size 0 until it is made
    channel: dict[str, int | str]  # the rings and doorbells: what wire.channel's WorkerEnd takes
    load_format: str  # "auto" or "dummy"
    gpus: tuple[int, ...]  # numbers of the visible GPUs: ours first, then those of our peers
    gpu_share: int  # workers on our GPU, this one included
    gpu_memory_utilization: float
    attention_backend: str
    handoff: str
    enforce_eager: bool
    instance: int = 0  # number of the instance that this worker is part of
    rank: int = 0  # its place there
    tp: int = 1  # the instance's shape: tensor, pipeline and expert degrees
    pp: int = 1
    ep: int = 1
    # The rings (what wire.channel's TeamEnd takes) of a leader to each of its followers, or of a
    # follower to its leader.
    team: tuple[dict[str, int | str], ...] = ()
    rendezvous_fd: int = -1  # inherited descriptor of memory in which the instance's workers meet
    board_fd: int = -1  # inherited descriptor of the memory that the instance's ranks share
    bell_fds: tuple[int, ...] = ()  # an inherited eventfd for each of its workers, in their order
    simulated: Simulated | None = None  # with device "sim"

    @property
    def team_size(self) -> int:
        """Workers that compute a DP rank's steps together; the first of them leads."""
        return self.tp * self.pp

    @property
    def leads(self) -> bool:
        """Whether this one has a queue of its own. Else it does what its leader does."""
        return self.rank % self.team_size == 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "WorkerSpec":
        values = json.loads(text)
        for name in ("cpus", "gpus", "team", "bell_fds"):
            values[name] = tuple(values[name])
        if (simulated := values["simulated"]) is not None:
            eos_token_ids = tuple(simulated["eos_token_ids"])
            values["simulated"] = Simulated(**{**simulated, "eos_token_ids": eos_token_ids})
        return WorkerSpec(**values)


_SLO_NAMES = {"ttft": "ttft_ms", "tpot": "tpot_ms"}
_SLO = re.compile(r"\s*(\w+)\s*=\s*(\d*\.?\d+)\s*(ms|s|)\s*")


def parse_slo(text: str) -> dict[str, float]:
    """Times such as "ttft=500ms,tpot=0.05s" (a bare number is in ms) in the form that a request's
    `slo` has: {"ttft_ms": 500.0, "tpot_ms": 50.0}. ConfigError says which part is wrong."""
    slo: dict[str, float] = {}
    for part in text.split(","):
        found = _SLO.fullmatch(part)
        if found is None or found[1] not in _SLO_NAMES:
            raise ConfigError(
                f"--slo {text!r}: {part.strip()!r} is no limit; write ttft and tpot such as"
                " ttft=500ms,tpot=50ms"
            )
        name, milliseconds = _SLO_NAMES[found[1]], float(found[2]) * (1e3 if found[3] == "s" else 1)
        if name in slo:
            raise ConfigError(f"--slo {text!r}: {found[1]} is given twice, once is enough")
        if not 0 < milliseconds < math.inf:
            raise ConfigError(f"--slo {text!r}: {found[1]} must be above 0 and finite")
        slo[name] = milliseconds
    return slo
