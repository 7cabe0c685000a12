"""The words of a frame. Shares are 0 to 1; None stands for what is not known (yet)."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Milliseconds."""

    count: int
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Span:
    """The last `seconds`: requests with an SLO by what became of them, and the times of all."""

    seconds: int
    offered: int
    good: int
    attainment: float | None
    goodput_per_s: float
    ended_per_s: float
    missed: dict[str, int]  # by blame, most first
    ttft_ms: Quantiles | None
    tpot_ms: Quantiles | None


@dataclass(frozen=True, slots=True)
class Series:
    """Points `step_s` apart, oldest first; None where nothing ended."""

    step_s: int
    attainment: tuple[float | None, ...]
    goodput_per_s: tuple[float, ...]
    ttft_p90_ms: tuple[float | None, ...]
    tpot_p90_ms: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Blocks:
    """KV blocks by state: free; pinned, of prefilled requests that others decode; active."""

    total: int
    free: int
    pinned: int
    active: int


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker. `busy` is its share of the time between two frames. Of one that follows all of
    its team's numbers are its leader's to tell, and its own are 0."""

    index: int
    role: str
    acting: str  # what it does now
    instance: int
    rank: int
    leader: int  # who plans the steps that it takes part in: itself, or the one that it follows
    gpu: int | None
    state: str
    reason: str  # why its last life ended
    restarts: int
    running: int
    waiting: int
    pinned: int
    blocks: Blocks
    kv_use: float
    step_ms: float
    busy: float | None
    tokens_per_s: float
    prompt_tokens_per_s: float
    waiting_tokens: int
    ring: dict[str, int]

    @property
    def leads(self) -> bool:
        return self.leader == self.index


@dataclass(frozen=True, slots=True)
class Admission:
    """How requests leave the buffer. `balance` and `fill` are of the prefill passes between two
    frames: mean over maximum of the ranks' tokens, and tokens over those there was room for."""

    name: str
    window_ms: float
    departures_per_s: float | None
    pass_ms: float | None
    balance: float | None
    fill: float | None
    queued: int
    queued_tokens: int
    parked: int
    falling_back: bool


@dataclass(frozen=True, slots=True)
class Handoffs:
    """Between two frames. `gb_per_s` is of the time that copies took."""

    per_s: float | None
    bytes_per_s: float | None
    gb_per_s: float | None


@dataclass(frozen=True, slots=True)
class Frame:
    """The node at one moment; `verdict` says in a line what limits goodput now."""

    model: str
    layout: str
    pid: int
    uptime_s: float
    state: str
    reasons: tuple[str, ...]
    verdict: str
    slo: dict[str, float]  # ttft_ms, tpot_ms of requests that bring none
    spans: tuple[Span, ...]  # shortest first
    series: Series
    histograms: dict[str, list[list[float]]]  # ttft_ms, tpot_ms: [longest ms, count]
    misses: tuple[dict[str, Any], ...]  # newest first
    requests: dict[str, int]
    rates: dict[str, float]
    admission: Admission
    handoff: Handoffs
    loop_lag_ms: float
    workers: tuple[Worker, ...]


def to_json(frame: Frame) -> dict[str, Any]:
    """For a page in a browser: the same names, plain values."""
    return asdict(frame)
