"""What `/nodeserve/view` may say: a busy 4p4d, the same with trouble, the same before its work."""

import math
from typing import Any

POINTS = 60
SLO = {"ttft_ms": 400.0, "tpot_ms": 40.0}


def wave(mean: float, swing: float, period: float = 17.0) -> list[float | None]:
    """One for each point of a series, always the same."""
    places = range(POINTS)
    return [mean + swing * math.sin(place / period * 2 * math.pi) for place in places]


def bins(first_ms: float, counts: list[int]) -> list[list[float]]:
    """[upper edge, count], each edge the square root of two times the one before."""
    return [[first_ms * 2 ** (place / 2), count] for place, count in enumerate(counts)]


def spread(p50: float, p90: float, p99: float, count: int) -> dict[str, float]:
    return {"p50": p50, "p90": p90, "p99": p99, "count": count}


def span(seconds: int, attainment: float, rate_per_s: float) -> dict[str, Any]:
    offered = round(seconds * rate_per_s)
    missed = offered - round(offered * attainment)
    decode, buffer = round(0.62 * missed), round(0.25 * missed)
    return {
        **{"seconds": seconds, "offered": offered, "good": offered - missed},
        **{"attainment": attainment, "goodput_per_s": attainment * rate_per_s},
        **{"ended_per_s": rate_per_s, "ttft_ms": spread(148.2, 371.5, 912.0, offered)},
        "tpot_ms": spread(24.6, 36.9, 58.1, offered),
        "missed": {"decode": decode, "buffer": buffer, "handoff": missed - decode - buffer},
    }


def worker(index: int, role: str, **changes: Any) -> dict[str, Any]:
    is_prefill = role == "prefill"
    kv_use = (0.31 + 0.04 * index) if is_prefill else (0.55 + 0.06 * index)
    values = {
        **{"index": index, "role": role, "acting": role, "instance": index, "rank": 0},
        **{"leader": index, "gpu": index, "state": "ready", "reason": "", "restarts": 0},
        **{"running": 3 if is_prefill else 41 + index, "waiting": 2 if is_prefill else 0},
        **{"pinned": 5 if is_prefill else 0, "waiting_tokens": 2048 if is_prefill else 0},
        "blocks": {"total": 8192, "free": 4000, "pinned": 60, "active": 4132},
        **{"kv_use": kv_use, "step_ms": 61.3 if is_prefill else 23.4, "busy": 0.71},
        **{"tokens_per_s": 38.0 if is_prefill else 1816.0 + 11 * index},
        "prompt_tokens_per_s": 21480.0 if is_prefill else 0.0,
        "ring": {},
    }
    return {**values, **changes}


def miss(ago_s: float, request: int, **changes: Any) -> dict[str, Any]:
    values = {
        **{"ago_s": ago_s, "request": request, "ttft_ms": 181.0, "tpot_ms": 52.3, "slo": SLO},
        **{"prompt_tokens": 1843, "output_tokens": 212, "blame": "decode"},
        **{"prefill_worker": 1, "decode_worker": 5},
    }
    return {**values, **changes}


def busy_view() -> dict[str, Any]:
    """Four prefill workers, four decode workers, nearly all in time."""
    prefill = [worker(index, "prefill") for index in range(4)]
    decode = [worker(index, "decode") for index in range(4, 8)]
    decode[1].update(kv_use=0.992, waiting=6)
    return {
        **{"model": "qwen3-30b-a3b", "layout": "4p4d", "pid": 4711, "uptime_s": 9312.0},
        **{"state": "ready", "reasons": [], "verdict": "decode KV full on w5: 62 % of misses"},
        "slo": SLO,
        "spans": [span(10, 0.93, 18.2), span(60, 0.914, 17.6), span(300, 0.958, 16.9)],
        "series": {
            "step_s": 5,
            "attainment": [min(1.0, value or 0.0) for value in wave(0.96, 0.07, 41)],
            "goodput_per_s": wave(16.1, 1.9),
            "ttft_p90_ms": wave(340.0, 60.0, 23),
            "tpot_p90_ms": wave(35.0, 4.0, 31),
        },
        "histograms": {
            "ttft_ms": bins(32.0, [2, 61, 302, 911, 1403, 1207, 622, 305, 121, 48, 17, 4]),
            "tpot_ms": bins(11.3, [8, 402, 1811, 2100, 551, 104, 27]),
        },
        "misses": [
            miss(3.2, 90112),
            miss(8.9, 90087, blame="buffer", ttft_ms=1130.0, tpot_ms=22.4, prompt_tokens=7210),
            miss(14.0, 90031, tpot_ms=47.9, decode_worker=7),
            miss(61.5, 89544, blame="refused", ttft_ms=None, tpot_ms=None, output_tokens=0)
            | {"prefill_worker": -1, "decode_worker": -1},
            miss(122.8, 88917, blame="handoff", tpot_ms=41.2),
        ],
        "requests": {"queued": 7, "running": 188, "parked": 3, "finished": 154_310}
        | {"failed": 2, "cancelled": 811, "rejected": 95},
        "rates": {"prompt_tokens_per_s": 85_920.0, "output_tokens_per_s": 7412.0}
        | {"requests_per_s": 17.6},
        "admission": {"name": "window", "window_ms": 18.3, "departures_per_s": 54.6}
        | {"pass_ms": 61.3, "balance": 0.94, "fill": 0.81, "queued": 7, "queued_tokens": 12_904}
        | {"parked": 3, "falling_back": False},
        "loop_lag_ms": 0.4,
        "handoff": {"per_s": 17.1, "bytes_per_s": 2.1e9, "gb_per_s": 38.6},
        "workers": prefill + decode,
    }


def troubled_view() -> dict[str, Any]:
    """One worker gone for the time being, one that stands in, one that came back."""
    view = busy_view()
    view.update(state="degraded", reasons=["worker 6 restarts in 3 s: killed by signal 9"])
    view["workers"][3].update(acting="decode")
    view["workers"][2].update(restarts=2)
    lost = {"state": "lost", "reason": "killed by signal 9", "restarts": 1, "kv_use": 0.0}
    view["workers"][6].update(lost, running=0, waiting=0, tokens_per_s=0.0, busy=None)
    view["admission"].update(falling_back=True)
    return view


def idle_view() -> dict[str, Any]:
    """A node that nobody has asked anything."""
    view = busy_view()
    nothing: dict[str, Any] = {
        "offered": 0,
        "good": 0,
        "attainment": None,
        "goodput_per_s": 0.0,
        "missed": {},
    }
    nothing |= {"ended_per_s": 0.0, "ttft_ms": None, "tpot_ms": None}
    view["spans"] = [one | nothing for one in view["spans"]]
    view["series"] = {name: [] for name in view["series"]} | {"step_s": 5}
    view["histograms"] = {"ttft_ms": [], "tpot_ms": []}
    rest = {"running": 0, "waiting": 0, "pinned": 0, "kv_use": 0.0, "tokens_per_s": 0.0}
    rest |= {"prompt_tokens_per_s": 0.0, "waiting_tokens": 0}
    view["workers"] = [one | rest | {"busy": 0.0} for one in view["workers"]]
    view["requests"] = dict.fromkeys(view["requests"], 0)
    view["rates"] = dict.fromkeys(view["rates"], 0.0)
    view["admission"] |= {"queued": 0, "queued_tokens": 0, "parked": 0, "pass_ms": None}
    view["handoff"] = dict.fromkeys(view["handoff"])
    view |= {"misses": [], "verdict": "idle: no requests yet", "slo": {}, "uptime_s": 41.0}
    return view
