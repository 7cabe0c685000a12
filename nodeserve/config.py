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
    which there are rope_dim / 2 (GGUF files carry the result of the rule, not its numbers); "yarn"
    divides slow frequencies as "linear" does, keeps fast ones and blends those between, by the
    turns that they make in `original_max_position`, and multiplies cos and sin by
    `attention_factor`.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    frequency_factors: tuple[float, ...] = ()
    beta_fast: float = 32.0  # turns from which on a frequency is kept
    beta_slow: float = 1.0  # turns below which it is divided
    truncate: bool = True  # the ends of the blend are whole numbers of a frequency
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class MlaConfig:
    """Multi-head latent attention: keys and values of all heads come from one latent of a token.

    A token's page entry is its latent (`kv_lora_rank` numbers, normed) and one rotated key that all
    heads share (`qk_rope_head_dim`). A head's query and key are `qk_nope_head_dim` numbers without
    a position, then the rotated ones.
    """

    kv_lora_rank: int
    q_lora_rank: int | None  # None: queries come straight from the hidden state
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    softmax_scale: float  # of the scores, YaRN's share in it
    norm_eps: float = 1e-6  # of the latents' norms: fixed, whatever the layers' is
    rope_interleaved: bool = True  # pairs (0, 1), (2, 3), ... turn together, not i and i + half

    @property
    def latent_dim(self) -> int:
        """Numbers that a token takes in a layer's page."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Layers whose MLP is many small ones, the experts, of which a router picks a few a token.

    A token's scores are the softmax or the sigmoid of its router logits. The experts with the
    `num_active` highest ones compute it; where there are groups, only those of the groups that
    score best, by their best expert ("max") or the sum of their two best ("top2").
    """

    num_experts: int
    num_active: int
    intermediate_size: int  # of one expert
    shared_intermediate_size: int = 0  # of what computes every token beside them; 0: nothing
    shared_gate: bool = False  # what is shared is weighed by the sigmoid of a row of weights
    scoring: str = "softmax"  # or "sigmoid"
    normalize: bool = True  # the weights of a token's experts are divided by their sum
    routed_scale: float = 1.0  # ... and then multiplied by this
    choice_bias: bool = False  # a bias for each expert, added to scores for the choice alone
    num_groups: int = 1
    num_active_groups: int = 1
    group_score: str = "max"  # or "top2"
    dense_layers: tuple[int, ...] = ()  # that have one MLP as other models do

    def num_in_layer(self, hidden_size: int, num_experts: int) -> int:
        """Weights of a sparse layer's MLPs, with so many of its experts."""
        inner = num_experts * self.intermediate_size + self.shared_intermediate_size
        return hidden_size * (self.num_experts + 3 * inner)


@dataclass(frozen=True, slots=True)
class OptConfig:
    """Where OPT differs from one size to the next."""

    embedding_size: int  # of a token's row; not the hidden size where two matrices lie between
    norm_first: bool = True  # before a half layer; else after it, on the residual stream itself
    final_norm: bool = True
    biased: bool = True  # the linears of its layers


@dataclass(frozen=True, slots=True)
class ForeignConfig:
    """A model that transformers' own code computes."""

    folder: str
    model_type: str  # as its config.json has it


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a decoder looks like, whatever file format said so. Read without torch."""

    architecture: str  # one of config_readers.READERS
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # of queries and keys
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
    moe: MoeConfig | None = None
    opt: OptConfig | None = None
    foreign: ForeignConfig | None = None
    mla: MlaConfig | None = None  # then num_kv_heads is 1: all heads read the same latents
    # Of matrices that the files keep in FP8: rows and columns that share a scale.
    fp8_block: tuple[int, int] | None = None

    @property
    def rope_dim(self) -> int:
        """Numbers of a head that are rotated."""
        return self.head_dim if self.mla is None else self.mla.qk_rope_head_dim

    def window_of(self, layer: int) -> int | None:
        """Tokens that a query of this layer sees, itself included; None: all."""
        return self.sliding_window if layer >= self.first_window_layer else None

    def is_sparse(self, layer: int) -> bool:
        """Whether this layer has experts."""
        return self.moe is not None and layer not in self.moe.dense_layers

    @property
    def num_weights(self) -> int:
        """Numbers in all its matrices; the rest does not count beside them."""
        return self._num_weights(self.moe.num_experts if self.moe else 0)

    @property
    def num_active_weights(self) -> int:
        """Those of them that one token's pass multiplies with: of the experts only its own."""
        return self._num_weights(self.moe.num_active if self.moe else 0)

    @property
    def num_routed_weights(self) -> int:
        """Those of all experts that a router chooses from."""
        if self.moe is None:
            return 0
        return self.num_weights - self._num_weights(0)

    def _num_weights(self, num_experts: int) -> int:
        dense = (2 if self.opt else 3) * self.hidden_size * self.intermediate_size
        layers = self.num_layers * (self._attention_weights + dense)
        if self.moe is not None:
            num_sparse = sum(map(self.is_sparse, range(self.num_layers)))
            sparse = self.moe.num_in_layer(self.hidden_size, num_experts)
            layers += num_sparse * (sparse - dense)
        return self.num_edge_weights + layers

    @property
    def num_edge_weights(self) -> int:
        """Those of the embedding and the head."""
        tables = 1 if self.tie_embeddings else 2
        if self.opt is None:
            return tables * self.vocab_size * self.hidden_size
        width = self.opt.embedding_size
        between = 2 * width * self.hidden_size if width != self.hidden_size else 0
        return tables * self.vocab_size * width + self.max_position * self.hidden_size + between

    @property
    def _attention_weights(self) -> int:
        """Numbers in the matrices of one layer's attention."""
        if (mla := self.mla) is None:
            return 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        query = self.num_heads * self.head_dim
        rank = mla.q_lora_rank
        queries = self.hidden_size * query if rank is None else rank * (self.hidden_size + query)
        keys = self.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        latents = self.hidden_size * mla.latent_dim + mla.kv_lora_rank * keys
        return queries + latents + self.num_heads * mla.v_head_dim * self.hidden_size

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of K and V, or of latents, that one token takes over all layers."""
        values = 2 * self.num_kv_heads * self.head_dim
        if self.mla is not None:
            values = self.mla.latent_dim
        return self.num_layers * values * dtype_bytes


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
    model_impl: str = "auto"  # whose code computes it: nodeserve, transformers; auto: who can
    expert_counts: str | None = None  # file of `nodeserve experts`: by it, ranks share experts
    redundant_experts: int = 0  # second copies of a layer's hot ones, in each instance
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
    experts_fd: int = -1  # inherited descriptor of expert counts; -1: each rank holds as many
    redundant_experts: int = 0
    board_fd: int = -1  # inherited descriptor of the memory that the instance's ranks share
    bell_fds: tuple[int, ...] = ()  # an inherited eventfd for each of its workers, in their order
    simulated: Simulated | None = None  # with device "sim"
    model_impl: str = "auto"  # "auto", "nodeserve" or "transformers"

    @property
    def num_workers(self) -> int:
        """Of its instance."""
        return self.team_size * self.ep

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
