"""The node's state as metrics, made at a scrape from what the server says of itself."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from nodeserve.gateway.families import counter, gauge
from nodeserve.gateway.goodput_metrics import of_dispatch, of_goodput
from nodeserve.gateway.meters import ENGINE, LABELS
from nodeserve.views import blocks_of

WORKER_LABELS = ("worker", "role", "instance")
WORKER_GAUGES = {  # key of a worker's stats: name, words, factor
    "running": ("running_requests", "Sequences that it decodes.", 1.0),
    "waiting": ("waiting_requests", "Prompts that it has not finished.", 1.0),
    "waiting_tokens": ("waiting_tokens", "Tokens of them.", 1.0),
    "pinned": ("pinned_requests", "Prefilled, their pages not fetched yet.", 1.0),
    "free_blocks": ("free_blocks", "KV blocks that nobody has.", 1.0),
    "num_blocks": ("blocks", "KV blocks.", 1.0),
    "step_ms": ("step_seconds", "Its last step.", 1e-3),
}
RING_WAYS = ("to", "from")  # the worker
MAX_REASON = 120  # characters of a label
WORKER_COUNTERS = {
    "steps": ("steps", "Steps."),
    "busy_s": ("busy_seconds", "That these took; one may begin while another runs."),
    "tokens": ("tokens", "Tokens sampled."),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens computed."),
    "handoffs": ("handoffs", "Requests whose pages it fetched."),
    "handoff_bytes": ("handoff_bytes", "Bytes of these."),
    "handoff_s": ("handoff_seconds", "That copying them took."),
    "restarts": ("restarts", "Its starts after the first."),
}


def node_text(about: dict[str, Any] | None, stats: dict[str, Any] | None) -> bytes:
    """In Prometheus' text format; None where the server did not answer."""
    registry = CollectorRegistry()
    registry.register(_Node(about, stats))
    return generate_latest(registry)


class _Node(Collector):
    def __init__(self, about: dict[str, Any] | None, stats: dict[str, Any] | None) -> None:
        self._about = about
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        up = self._about is not None and self._stats is not None
        yield gauge("nodeserve_up", "Whether the server answers.", [((), float(up))])
        if self._about is not None and self._stats is not None:
            yield from under_their_names(self._about, self._stats)
            yield from of_node(self._about, self._stats)
            yield from of_goodput(self._stats["goodput"])
            yield from of_dispatch(self._stats["dispatch"])
            yield from of_workers(self._stats["workers"])
            yield from of_rings(self._stats["workers"])
            yield from of_lives(self._stats["workers"])


def under_their_names(about: dict[str, Any], stats: dict[str, Any]) -> Iterator[Metric]:
    """vLLM's gauges."""
    labels, requests = (stats["model"], ENGINE), stats["requests"]
    total = sum(worker["num_blocks"] for worker in stats["workers"])
    free = sum(max(0, worker["free_blocks"]) for worker in stats["workers"])
    used = (1.0 - free / total if total else 0.0,)
    for name, words, value in (
        ("num_requests_running", "Requests that left the buffer.", requests["running"]),
        ("num_requests_waiting", "Requests that wait for prefill.", requests["queued"]),
        ("kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.", *used),
        ("gpu_cache_usage_perc", "As kv_cache_usage_perc, which replaced it.", *used),
    ):
        yield gauge(f"vllm:{name}", words, [(labels, value)], LABELS)
    config = (*labels, str(about["block_size"]), str(total))
    names = (*LABELS, "block_size", "num_gpu_blocks")
    yield gauge("vllm:cache_config_info", "The KV memory.", [(config, 1.0)], names)


def of_node(about: dict[str, Any], stats: dict[str, Any]) -> Iterator[Metric]:
    info = (stats["model"], stats["layout"], str(about["version"]))
    yield gauge("nodeserve_info", "The server.", [(info, 1.0)], ("model", "layout", "version"))
    requests, dispatch, health = stats["requests"], stats["dispatch"], stats["health"]
    yield gauge(
        "nodeserve_requests",
        "Requests of all clients by where they are.",
        [((state,), requests[state]) for state in ("queued", "running", "parked")],
        ("state",),
    )
    yield counter(
        "nodeserve_ended_requests",
        "Requests of all clients by how they ended.",
        [((how,), requests[how]) for how in ("finished", "failed", "cancelled", "rejected")],
        ("outcome",),
    )
    for name, words, value in (
        ("uptime_seconds", "Since its start.", stats["uptime_s"]),
        ("ready", "Whether it takes requests that somebody can compute.", float(health["ready"])),
        (
            "loop_lag_seconds",
            "How late its loop was of late, at worst.",
            health["loop_lag_ms"] / 1e3,
        ),
        ("queued_tokens", "Tokens of the prompts in the buffer.", dispatch["queued_tokens"]),
        ("window_seconds", "Between departures; 0: none.", dispatch["window_ms"] / 1e3),
        ("pass_seconds", "Mean of a prefill pass.", (dispatch["pass_ms"] or 0.0) / 1e3),
        ("falling_back", "Whether requests leave on arrival.", float(dispatch["falling_back"])),
    ):
        yield gauge(f"nodeserve_{name}", words, [((), value)])


def labels_of(workers: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [(str(one["index"]), one["role"], str(one["instance"])) for one in workers]


def of_workers(workers: list[dict[str, Any]]) -> Iterator[Metric]:
    labels = labels_of(workers)
    ready = [float(one["state"] == "ready") for one in workers]
    rows = list(zip(labels, ready, strict=True))
    yield gauge("nodeserve_worker_ready", "Whether it serves.", rows, WORKER_LABELS)
    for key, (name, words, factor) in WORKER_GAUGES.items():
        rows = [(label, factor * one[key]) for label, one in zip(labels, workers, strict=True)]
        yield gauge(f"nodeserve_worker_{name}", words, rows, WORKER_LABELS)
    for key, (name, words) in WORKER_COUNTERS.items():
        rows = [(label, one[key]) for label, one in zip(labels, workers, strict=True)]
        yield counter(f"nodeserve_worker_{name}", words, rows, WORKER_LABELS)


def of_rings(workers: list[dict[str, Any]]) -> Iterator[Metric]:
    """The ways to and from each worker."""
    labels, names = labels_of(workers), (*WORKER_LABELS, "direction")
    rings = [(label, one["ring"]) for label, one in zip(labels, workers, strict=True)]
    rows = [((*label, way), ring[f"{way}_bytes"]) for label, ring in rings for way in RING_WAYS]
    yield gauge("nodeserve_worker_ring_bytes", "In a ring, not read yet.", rows, names)
    rows = [((*label, way), ring[f"{way}_stalls"]) for label, ring in rings for way in RING_WAYS]
    words = "Times that a sender had to wait for room."
    yield counter("nodeserve_worker_ring_stalls", words, rows, names)
    for key, name, words in (
        ("capacity_bytes", "capacity_bytes", "Of each of its two rings."),
        ("to_queued", "queued_records", "Records to it that wait for room."),
    ):
        rows = [(label, ring[key]) for label, ring in rings]
        yield gauge(f"nodeserve_worker_ring_{name}", words, rows, WORKER_LABELS)


def of_lives(workers: list[dict[str, Any]]) -> Iterator[Metric]:
    """Blocks by state, what each does now, and why its last life ended."""
    named = list(zip(labels_of(workers), workers, strict=True))
    rows = [
        ((*label, state), float(getattr(blocks_of(one), state)))
        for label, one in named
        for state in ("free", "pinned", "active")
    ]
    words = "KV blocks by state; pinned ones wait for a decode worker, or are being fetched."
    yield gauge("nodeserve_worker_kv_blocks", words, rows, (*WORKER_LABELS, "state"))
    rows = [((*label, one["acting"], one["state"]), 1.0) for label, one in named]
    words = "What it does now (mixed: it stands in for a phase that nobody is there for)."
    yield gauge("nodeserve_worker_info", words, rows, (*WORKER_LABELS, "acting", "state"))
    rows = [((*label, one["reason"][:MAX_REASON]), 1.0) for label, one in named if one["reason"]]
    words = "Why its last life ended, if there was one before."
    yield gauge("nodeserve_worker_last_end_info", words, rows, (*WORKER_LABELS, "reason"))
