"""Goodput as metrics: attainment, misses by what is to blame, how passes were filled."""

from collections.abc import Iterator
from typing import Any

from prometheus_client.core import Metric

from nodeserve.blame import WORDS
from nodeserve.gateway.families import Rows, counter, gauge

QUANTILES = {"p50": "0.5", "p90": "0.9", "p99": "0.99"}
PASSES = {  # key of the sums over prefill passes: name, words
    "num": ("prefill_passes", "Passes that had some of a prompt."),
    "seconds": ("prefill_pass_seconds", "That they took."),
    "tokens": ("prefill_pass_tokens", "Prompt tokens in them."),
    "room": ("prefill_pass_room_tokens", "Prompt tokens that they had room for."),
    "balance": (
        "prefill_pass_balance_sum",
        "Of each, the mean over the maximum of its ranks' tokens: over their number, 1 is even.",
    ),
}


def of_goodput(goodput: dict[str, Any]) -> Iterator[Metric]:
    """All clients of the node together."""
    total, spans = goodput["total"], goodput["spans"]
    yield counter(
        "nodeserve_slo_offered_requests",
        "Requests with an SLO that ended or were refused.",
        [((), total["offered"])],
    )
    yield counter("nodeserve_slo_good_requests", "Those that met it.", [((), total["good"])])
    yield counter(
        "nodeserve_slo_missed_requests",
        "Those that missed it, by what is to blame.",
        [((word,), total["missed"].get(word, 0)) for word in WORDS],
        ("blame",),
    )
    labels = [f"{span['seconds']}s" for span in spans]
    shares = [(label, span["attainment"]) for label, span in zip(labels, spans, strict=True)]
    yield gauge(
        "nodeserve_slo_attainment",
        "Share that met their SLO, of those of the last seconds; none: nobody had one.",
        [((label,), share) for label, share in shares if share is not None],
        ("span",),
    )
    rows: Rows
    for name, words in (
        ("goodput", "Requests that met their SLO, a second."),
        ("ended", "Requests that ended well, with or without an SLO, a second."),
    ):
        rows = [
            ((label,), span[f"{name}_per_s"]) for label, span in zip(labels, spans, strict=True)
        ]
        yield gauge(f"nodeserve_{name}_requests_per_second", words, rows, ("span",))
    for name, words in (
        ("ttft", "Time to the first token."),
        ("tpot", "Mean time of each token after it."),
    ):
        rows = [
            ((label, QUANTILES[key]), span[f"{name}_ms"][key] / 1e3)
            for label, span in zip(labels, spans, strict=True)
            if span[f"{name}_ms"] is not None
            for key in QUANTILES
        ]
        yield gauge(f"nodeserve_{name}_seconds", words, rows, ("span", "quantile"))


def of_dispatch(dispatch: dict[str, Any]) -> Iterator[Metric]:
    """How requests leave the buffer, and how the passes that they board are filled."""
    yield counter(
        "nodeserve_departures",
        "Batches that left the buffer for a prefill instance.",
        [((), dispatch["departures"])],
    )
    for key, (name, words) in PASSES.items():
        yield counter(f"nodeserve_{name}", words, [((), dispatch["passes"][key])])
