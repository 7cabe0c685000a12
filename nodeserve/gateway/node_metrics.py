"""The node's state as metrics, made at a scrape from what the server says of itself."""

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nodeserve.gateway.meters import ENGINE, LABELS

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
WORKER_COUNTERS = {
    "steps": ("steps", "Steps."),
    "tokens": ("tokens", "Tokens sampled."),
    "handoffs": ("handoffs", "Requests whose pages it fetched."),
    "handoff_bytes": ("handoff_bytes", "Bytes of these."),
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
            yield from of_workers(self._stats["workers"])


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
    requests, dispatch = stats["requests"], stats["dispatch"]
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
        ("queued_tokens", "Tokens of the prompts in the buffer.", dispatch["queued_tokens"]),
        ("window_seconds", "Between departures; 0: none.", dispatch["window_ms"] / 1e3),
        ("pass_seconds", "Mean of a prefill pass.", (dispatch["pass_ms"] or 0.0) / 1e3),
        ("falling_back", "Whether requests leave on arrival.", float(dispatch["falling_back"])),
    ):
        yield gauge(f"nodeserve_{name}", words, [((), value)])


def of_workers(workers: list[dict[str, Any]]) -> Iterator[Metric]:
    labels = [(str(one["index"]), one["role"], str(one["instance"])) for one in workers]
    ready = [float(one["state"] == "ready") for one in workers]
    rows = list(zip(labels, ready, strict=True))
    yield gauge("nodeserve_worker_ready", "Whether it serves.", rows, WORKER_LABELS)
    for key, (name, words, factor) in WORKER_GAUGES.items():
        rows = [(label, factor * one[key]) for label, one in zip(labels, workers, strict=True)]
        yield gauge(f"nodeserve_worker_{name}", words, rows, WORKER_LABELS)
    for key, (name, words) in WORKER_COUNTERS.items():
        rows = [(label, one[key]) for label, one in zip(labels, workers, strict=True)]
        yield counter(f"nodeserve_worker_{name}", words, rows, WORKER_LABELS)


Rows = Iterable[tuple[tuple[str, ...], float]]


def gauge(name: str, words: str, rows: Rows, labels: tuple[str, ...] = ()) -> Metric:
    family = GaugeMetricFamily(name, words, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def counter(name: str, words: str, rows: Rows, labels: tuple[str, ...] = ()) -> Metric:
    family = CounterMetricFamily(name, words, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family
