"""What a client sends to: one interface, two protocols (`socket_target`, `openai_target`)."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from nodeserve.errors import ConfigError
from nodeserve.loadgen.records import Job, Sample

APIS = ("completions", "chat")


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """Where requests go and how. `url` None: the node's own socket, at `socket` or the usual place.

    `block_tokens` is the size of a trace's shared blocks after its lengths were divided.
    `slo_ms` is told with every request, if given; over HTTP in headers of our gateway.
    """

    url: str | None = None
    socket: str | None = None
    api: str = "completions"
    model: str | None = None  # None: the first that the server lists
    tokenizer: str | None = None  # folder or .gguf file, for texts of exact length
    prompts_as_text: bool = False  # for /v1/completions of servers that take no token ids
    vocab_size: int | None = None
    ignore_eos: bool = True
    extra_body: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    connect_timeout_s: float = 30.0
    block_tokens: int = 512
    slo_ms: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.api not in APIS:
            raise ConfigError(f"--api {self.api}: use completions or chat")


@dataclass(frozen=True, slots=True)
class About:
    """What a server says about itself; None: it does not say."""

    model: str
    kind: str  # nodeserve or openai
    num_workers: int | None = None
    max_model_len: int | None = None
    exact_prompts: bool = True  # the prompts' lengths are those that were asked for


class Target(Protocol):
    """A server. `ask` fills in a sample and raises NodeServeError where the request fails."""

    async def open(self) -> About: ...

    def payload(self, job: Job, run: int) -> bytes:
        """Everything of the request that can be made before its time."""
        ...

    async def ask(self, job: Job, payload: bytes, sample: Sample, began_s: float) -> None:
        """Send, and read to the end; times in the sample are from `began_s` on."""
        ...

    async def close(self) -> None: ...
