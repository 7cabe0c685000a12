"""What a server may say of itself (`stats`), made up."""

from typing import Any

Stats = dict[str, Any]


def worker(index: int, role: str, **values: Any) -> Stats:
    return {
        **{"index": index, "role": role, "acting": role, "instance": index, "rank": 0},
        **{
            "leader": index,
            "gpu": None,
            "state": "ready",
            "reason": "",
            "restarts": 0,
            "pid": 100 + index,
        },
        **{"running": 0, "waiting": 0, "pinned": 0, "waiting_tokens": 0},
        **{"num_blocks": 100, "free_blocks": 100, "pinned_blocks": 0, "step_ms": 20.0},
        **{"busy_s": 0.0, "tokens_per_s": 0.0, "prompt_tokens_per_s": 0.0},
        **{"steps": 0, "tokens": 0, "prompt_tokens": 0},
        **{"handoffs": 0, "handoff_bytes": 0, "handoff_s": 0.0},
        "ring": {
            **{"to_bytes": 0, "to_queued": 0, "to_stalls": 0},
            **{"from_bytes": 0, "from_stalls": 0, "capacity_bytes": 1 << 20},
        },
        **values,
    }


def span(seconds: int, good: int = 0, **missed: int) -> Stats:
    """`missed` by blame, with _ for a blank."""
    words = {name.replace("_", " "): count for name, count in missed.items()}
    offered = good + sum(missed.values())
    return {
        **{"seconds": seconds, "offered": offered, "good": good, "missed": words},
        **{"attainment": good / offered if offered else None, "goodput_per_s": good / seconds},
        **{"ended_per_s": offered / seconds, "ttft_ms": None},
        "tpot_ms": {"count": 1, "p50": 1.0, "p90": 2.0, "p99": 3.0},
    }


def answer(uptime_s: float = 100.0, spans: list[Stats] | None = None, **values: Any) -> Stats:
    """Of an idle 1p1d, but for what is given."""
    passes = {"num": 0, "seconds": 0.0, "tokens": 0, "room": 0, "balance": 0.0}
    lines = ("attainment", "goodput_per_s", "ttft_p90_ms", "tpot_p90_ms")
    return {
        **{"model": "m", "layout": "1p1d", "pid": 1, "uptime_s": uptime_s, "slo": {"ttft_ms": 500}},
        "health": {"state": "ready", "ready": True, "reasons": [], "loop_lag_ms": 7.0},
        "goodput": {
            "spans": spans or [span(10), span(60), span(300)],
            "total": {"offered": 0, "good": 0, "missed": {}},
            "series": {"step_s": 5, **{line: [0.5, None] for line in lines}},
            "histograms": {"ttft_ms": [[1.0, 2]], "tpot_ms": []},
            "misses": [],
        },
        "requests": {
            **{"queued": 0, "running": 0, "parked": 0},
            **{"finished": 0, "failed": 0, "cancelled": 0, "rejected": 0},
        },
        "rates": {"prompt_tokens_per_s": 0.0, "output_tokens_per_s": 0.0, "requests_per_s": 0.0},
        "dispatch": {
            **{"admission": "staggered", "window_ms": 9.0, "pass_ms": 210.0, "departures": 0},
            **{"queued_tokens": 0, "falling_back": False, "passes": passes, "queue": []},
        },
        "workers": [worker(0, "prefill"), worker(1, "decode")],
        **values,
    }
