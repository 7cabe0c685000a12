"""The node's state as plain numbers, for `status` and for clients; docs/protocol.md names them.

Counters begin with the server, a worker's with its present life, but for `restarts`. Whoever wants
a rate takes two of these.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from nodeserve.coordinator.coordinator import Coordinator
from nodeserve.coordinator.dispatch import Dispatch
from nodeserve.coordinator.link import STARTING, WorkerLink
from nodeserve.errors import RingError
from nodeserve.policy.prefill_instance import PrefillInstance
from nodeserve.types import Role

BYTES_PER_ID = 4  # of a packed block id


def worker_stats(link: WorkerLink, num_pinned_blocks: int, now_s: float) -> dict[str, Any]:
    """One worker's row; of its blocks so many wait to be pulled, or are being."""
    load, counters, info = link.account.load, link.counters, link.info
    return {
        "index": link.index,
        "role": link.role.value,
        "acting": link.acting.value,
        "instance": link.instance,
        "rank": link.rank,
        "leader": link.leader,
        "pid": link.process.pid if link.process else 0,
        "state": STARTING if link.alive and link.joining else link.state,
        "restarts": link.num_restarts,
        "restart_in_s": None if link.restart_at_s is None else max(0.0, link.restart_at_s - now_s),
        "reason": link.reason,
        "running": load.num_running,
        "waiting": load.num_waiting,
        "pinned": load.num_pinned,
        "free_blocks": load.num_free_blocks if link.leads else 0,
        "num_blocks": info.num_blocks if info and link.leads else 0,
        "pinned_blocks": num_pinned_blocks,
        "waiting_tokens": load.waiting_tokens,
        "steps": counters.steps,
        "step_ms": 1e3 * counters.step_s,
        "busy_s": counters.busy_s,
        "tokens": counters.tokens,
        "tokens_per_s": counters.token_rate.per_s(now_s),
        "prompt_tokens": counters.prompt_tokens,
        "prompt_tokens_per_s": counters.prompt_rate.per_s(now_s),
        "handoffs": counters.handoffs,
        "handoff_bytes": counters.handoff_bytes,
        "handoff_s": counters.handoff_s,
        "ring": ring_stats(link),
        "threads": info.num_threads if info else 0,
        "gpu": link.gpu,
        "kernels": info.kernels if info else "",
        "handoff": info.handoff if info else "",
    }


def ring_stats(link: WorkerLink) -> dict[str, int]:
    """How full the rings to and from it are, and how often a sender had to wait for room."""
    inbox, outbox = link.channel.inbox, link.channel.outbox
    try:
        depths = inbox.pending_bytes, outbox.pending_bytes
    except RingError:  # damaged or closed: its worker's end is on its way
        depths = 0, 0
    return {
        "to_bytes": depths[0],
        "to_queued": inbox.num_queued,
        "to_stalls": inbox.num_stalls,
        "from_bytes": depths[1],
        "from_stalls": outbox.num_stalls,
        "capacity_bytes": link.channel.capacity_bytes,
    }


def pinned_blocks(coordinator: Coordinator) -> Mapping[int, int]:
    """By worker: blocks of requests that somebody else decodes, or will. O(requests)."""
    found: Counter[int] = Counter()
    for request in coordinator.requests.values():
        if request.source >= 0:
            found[request.source] += len(request.source_blocks) // BYTES_PER_ID
    return found


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
    totals, queued = coordinator.totals, coordinator.dispatch.num_queued
    return {
        "queued": queued,
        "running": len(coordinator.requests) - queued,
        "parked": len(coordinator.dispatch.parked),
        "finished": totals.finished,
        "failed": totals.failed,
        "cancelled": totals.cancelled,
        "rejected": totals.rejected,
    }


def dispatch_stats(dispatch: Dispatch) -> dict[str, Any]:
    """How requests leave the buffer, what waits in it, and who would get some."""
    dispatcher, policies = dispatch.dispatcher, dispatch.policies
    window, instances = dispatcher.window, dispatcher.instances
    interval_s = window.interval_s(sum(one.takes_part for one in instances))
    return {
        "admission": policies.dispatch.admission,
        "decode_allocation": policies.decode_allocation,
        "window_ms": 1e3 * interval_s,
        "pass_ms": None if window.pass_s is None else 1e3 * window.pass_s,
        "falling_back": dispatcher.falling_back,
        "queued_tokens": dispatcher.num_tokens,
        "queue": dispatch.queue(),
        "instances": [{"instance": one.number, "state": state_of(one)} for one in instances],
        "departures": dispatch.num_departures,
        "passes": dispatcher.filled.stats(),
    }


def state_of(instance: PrefillInstance) -> str:
    """In a word."""
    if instance.lost:
        return "lost"
    if instance.suspect:
        return "suspect"
    return "idle" if instance.empty else "busy"


def node_stats(coordinator: Coordinator, now_s: float) -> dict[str, Any]:
    """Everything but what only the server knows (model, layout, uptime)."""
    links, pinned = coordinator.links, pinned_blocks(coordinator)
    return {
        "slo": dict(coordinator.dispatch.policies.slo),
        "goodput": coordinator.ledger.stats(now_s),
        "requests": request_stats(coordinator),
        "dispatch": dispatch_stats(coordinator.dispatch),
        "rates": {
            "prompt_tokens_per_s": sum(x.counters.prompt_rate.per_s(now_s) for x in links),
            "output_tokens_per_s": sum(x.counters.token_rate.per_s(now_s) for x in links),
            "requests_per_s": coordinator.totals.finish_rate.per_s(now_s),
        },
        "workers": [worker_stats(link, pinned.get(link.index, 0), now_s) for link in links],
    }
