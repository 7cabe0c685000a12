"""From what the server says of itself (`stats`, docs/protocol.md) to frames.

Most of a frame is in one answer. Shares of time and rates compare it with one of two seconds
before, by the server's own uptime: another server, or one that was started anew, begins anew.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from nodeserve.views.frame import (
    Admission,
    Blocks,
    Frame,
    Handoffs,
    Quantiles,
    Series,
    Span,
    Worker,
)
from nodeserve.views.verdict import verdict_of

COMPARED_S = 2.0  # long enough for some passes of every kind
Stats = Mapping[str, Any]


class History:
    """The answers that the next one may be compared with."""

    def __init__(self) -> None:
        self._earlier: deque[Stats] = deque()

    def add(self, stats: Stats) -> Frame:
        """The frame of the newest answer of a server."""
        earlier = self._earlier
        if earlier and not follows(earlier[-1], stats):
            earlier.clear()
        while len(earlier) > 1 and stats["uptime_s"] - earlier[1]["uptime_s"] >= COMPARED_S:
            earlier.popleft()
        frame = frame_of(earlier[0] if earlier else None, stats)
        earlier.append(stats)
        return frame


def follows(last: Stats, stats: Stats) -> bool:
    """Whether both are of one life of a server, in this order."""
    return bool(last["pid"] == stats["pid"] and last["uptime_s"] <= stats["uptime_s"])


class Change:
    """What happened between two answers; None where that cannot be said."""

    def __init__(self, before: Stats | None, stats: Stats) -> None:
        self.seconds = 0.0 if before is None else stats["uptime_s"] - before["uptime_s"]
        self._before = before
        self._stats = stats
        self._workers = {} if before is None else {one["pid"]: one for one in before["workers"]}

    def of(self, part: str, *names: str) -> float | None:
        """By how much a number grew, by its way from a part of the answer."""
        if self._before is None:
            return None
        return grown(number_at(self._before[part], names), number_at(self._stats[part], names))

    def of_worker(self, worker: Stats, name: str) -> float | None:
        """By how much a number of this life of a worker grew."""
        if not worker["pid"] or (before := self._workers.get(worker["pid"])) is None:
            return None
        return grown(before[name], worker[name])

    def of_workers(self, name: str) -> float | None:
        """All lives together that are in both answers."""
        found = [self.of_worker(one, name) for one in self._stats["workers"]]
        known = [one for one in found if one is not None]
        return sum(known) if known else None

    def per_s(self, change: float | None) -> float | None:
        return quotient(change, self.seconds)


def number_at(values: Any, names: tuple[str, ...]) -> float:
    for name in names:
        values = values[name]
    return float(values)


def grown(before: float, now: float) -> float | None:
    return now - before if now >= before else None


def quotient(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def frame_of(before: Stats | None, stats: Stats) -> Frame:
    """A frame; `before` is an earlier answer of the same server, or None."""
    change = Change(before, stats)
    health, goodput = stats["health"], stats["goodput"]
    series: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in known(Series, goodput["series"]).items()
    }
    frame = Frame(
        model=stats["model"],
        layout=stats["layout"],
        pid=stats["pid"],
        uptime_s=stats["uptime_s"],
        state=health["state"],
        reasons=tuple(health["reasons"]),
        verdict="",
        slo=dict(stats["slo"]),
        spans=tuple(map(span_of, goodput["spans"])),
        series=Series(**series),
        histograms=dict(goodput["histograms"]),
        misses=tuple(goodput["misses"]),
        requests=dict(stats["requests"]),
        rates=dict(stats["rates"]),
        admission=admission_of(stats, change),
        handoff=handoffs_of(change),
        loop_lag_ms=health["loop_lag_ms"],
        workers=tuple(worker_of(one, change) for one in stats["workers"]),
    )
    return replace(frame, verdict=verdict_of(frame))


def known(kind: type[Any], values: Stats) -> dict[str, Any]:
    """Those that a part of a frame has; a newer server says more."""
    return {one.name: values[one.name] for one in fields(kind) if one.name in values}


def span_of(span: Stats) -> Span:
    times = {name: span[name] for name in ("ttft_ms", "tpot_ms")}
    quantiles = {
        name: None if one is None else Quantiles(**known(Quantiles, one))
        for name, one in times.items()
    }
    return Span(**{**known(Span, span), **quantiles})


def admission_of(stats: Stats, change: Change) -> Admission:
    dispatch, requests = stats["dispatch"], stats["requests"]
    passes = {
        name: change.of("dispatch", "passes", name) for name in ("num", "balance", "tokens", "room")
    }
    return Admission(
        name=dispatch["admission"],
        window_ms=dispatch["window_ms"],
        departures_per_s=change.per_s(change.of("dispatch", "departures")),
        pass_ms=dispatch["pass_ms"],
        balance=quotient(passes["balance"], passes["num"]),
        fill=quotient(passes["tokens"], passes["room"]),
        queued=requests["queued"],
        queued_tokens=dispatch["queued_tokens"],
        parked=requests["parked"],
        falling_back=dispatch["falling_back"],
    )


def handoffs_of(change: Change) -> Handoffs:
    num_bytes, seconds = change.of_workers("handoff_bytes"), change.of_workers("handoff_s")
    while_copying = quotient(num_bytes, seconds)
    return Handoffs(
        per_s=change.per_s(change.of_workers("handoffs")),
        bytes_per_s=change.per_s(num_bytes),
        gb_per_s=None if while_copying is None else while_copying / 1e9,
    )


def worker_of(worker: Stats, change: Change) -> Worker:
    blocks = blocks_of(worker)
    busy = change.per_s(change.of_worker(worker, "busy_s"))
    derived: dict[str, Any] = {
        "blocks": blocks,
        "kv_use": 1.0 - blocks.free / blocks.total if blocks.total else 0.0,
        "busy": None if busy is None else min(1.0, busy),  # steps may overlap
    }
    return Worker(**{**known(Worker, worker), **derived})


def blocks_of(worker: Stats) -> Blocks:
    """What waiting prompts will take counts as active: then fewer than none may be free."""
    total = worker["num_blocks"]
    free = min(max(0, worker["free_blocks"]), total)
    pinned = min(worker["pinned_blocks"], total - free)
    return Blocks(total, free, pinned, total - free - pinned)
