"""The node's state as plain numbers, for `status` and for clients."""

from collections.abc import Sequence
from typing import Any

from nodeserve.coordinator.coordinator import Coordinator
from nodeserve.coordinator.link import WorkerLink
from nodeserve.types import Role


def worker_stats(link: WorkerLink, now_s: float) -> dict[str, Any]:
    """One worker's row."""
    load, counters, info = link.load, link.counters, link.info
    return {
        "index": link.index,
        "role": link.role.value,
        "instance": link.instance,
        "rank": link.rank,
        "pid": link.process.pid if link.process else 0,
        "state": link.state,
        "running": load.num_running,
        "waiting": load.num_waiting,
        "pinned": load.num_pinned,
        "free_blocks": load.num_free_blocks,
        "num_blocks": info.num_blocks if info else 0,
        "waiting_tokens": load.waiting_tokens,
        "steps": counters.steps,
        "step_ms": 1e3 * counters.step_s,
        "tokens": counters.tokens,
        "tokens_per_s": counters.token_rate.per_s(now_s),
        "handoffs": counters.handoffs,
        "handoff_bytes": counters.handoff_bytes,
        "threads": info.num_threads if info else 0,
        "gpu": link.gpu,
        "kernels": info.kernels if info else "",
        "handoff": info.handoff if info else "",
    }


def how_they_run(links: Sequence[WorkerLink]) -> list[str]:
    """A line for each kind of worker: its kernels, and how its pages reach others."""
    kinds: dict[str, list[str]] = {}
    alone = not any(link.role is Role.PREFILL for link in links)
    for link in links:
        if link.info is not None:
            handoff = "" if alone else f"; handoff: {link.info.handoff}"
            kinds.setdefault(f"kernels: {link.info.kernels}{handoff}", []).append(str(link.index))
    if len(kinds) == 1:
        return list(kinds)
    return [f"worker {', '.join(indices)}: {kind}" for kind, indices in kinds.items()]


def request_stats(coordinator: Coordinator) -> dict[str, int]:
    """How many requests are where, and how the others ended."""
    totals, queued = coordinator.totals, len(coordinator.waiting)
    return {
        "queued": queued,
        "running": len(coordinator.requests) - queued,
        "parked": len(coordinator.parked),
        "finished": totals.finished,
        "failed": totals.failed,
        "cancelled": totals.cancelled,
        "rejected": totals.rejected,
    }


def node_stats(coordinator: Coordinator, now_s: float) -> dict[str, Any]:
    """Everything but what only the server knows (model, layout, uptime)."""
    links = coordinator.links
    return {
        "requests": request_stats(coordinator),
        "rates": {
            "prompt_tokens_per_s": sum(x.counters.prompt_rate.per_s(now_s) for x in links),
            "output_tokens_per_s": sum(x.counters.token_rate.per_s(now_s) for x in links),
            "requests_per_s": coordinator.totals.finish_rate.per_s(now_s),
        },
        "workers": [worker_stats(link, now_s) for link in links],
    }
