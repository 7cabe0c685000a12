"""A run as JSON. Names are those of vLLM's benchmark where they mean the same; times that end in
_ms are milliseconds, lists of single requests are seconds as there."""

import dataclasses
import math
from typing import Any

from nodeserve.loadgen.bench import Result
from nodeserve.loadgen.blame import culprits
from nodeserve.loadgen.measure import Report, SloOf, Times, counts
from nodeserve.plan.search import Found

METRICS = {"ttft": "ttft", "tpot": "tpot", "itl": "itl", "e2el": "e2e", "worst_gap": "worst_gap"}


def result_json(result: Result, confidence: float, num_workers: int | None) -> dict[str, Any]:
    """The numbers of one run."""
    report = result.report
    low, high = report.tally.interval(confidence)
    return {
        "request_rate": result.rate,
        "offered_rate": report.offered_per_s,
        "num_prompts": report.tally.num_offered,
        "completed": report.num_done,
        "unknown": report.tally.num_unknown,
        "failed": report.tally.num_offered - report.num_done,
        "duration": report.duration_s,
        "total_input_tokens": report.prompt_tokens,
        "total_output_tokens": report.output_tokens,
        "request_throughput": report.requests_per_s,
        "output_throughput": per_s(report.output_tokens, report),
        "total_token_throughput": per_s(report.output_tokens + report.prompt_tokens, report),
        "request_goodput": report.goodput_per_s,
        "request_goodput_per_worker": each(report.goodput_per_s, num_workers),
        "good_token_throughput": per_s(report.good_tokens, report),
        "attainment": report.tally.share,
        "attainment_interval": [low, high],
        "smallest_slo_scale": report.smallest_scale,
        **{
            key: value
            for name, field in METRICS.items()
            for key, value in times_json(name, getattr(report, field)).items()
        },
        "missed": report.missed,
        "blame": report.blame,
        "errors_by_code": report.errors,
        "short_outputs": report.num_short,
        "other_prompt_lengths": report.num_other_prompts,
        "valid": report.punctuality.valid,
        "punctuality": dataclasses.asdict(report.punctuality),
        "given_up": result.given_up,
    }


def per_s(count: int, report: Report) -> float:
    return count / report.duration_s if report.duration_s > 0.0 else 0.0


def each(rate: float, num_workers: int | None) -> float | None:
    """A worker's share; None where nobody says how many there are."""
    return rate / num_workers if num_workers else None


def times_json(name: str, times: Times | None) -> dict[str, float]:
    """mean_NAME_ms, median_NAME_ms and so on; nothing where there are no times."""
    if times is None:
        return {}
    return {
        f"mean_{name}_ms": 1e3 * times.mean,
        f"median_{name}_ms": 1e3 * times.p50,
        f"std_{name}_ms": 1e3 * times.std,
        **{f"p{level}_{name}_ms": 1e3 * getattr(times, f"p{level}") for level in (50, 90, 99)},
    }


def details_json(
    result: Result, slo_of: SloOf, settle_s: float = 0.0, forced: bool = True
) -> dict[str, list[Any]]:
    """Every request, in the order of the schedule. `blames` are "" for those that were good, and
    for those that do not count."""
    samples = result.samples
    counted = [one for one in samples if counts(one, settle_s) and one.is_known]
    slos = [slo_of(one.job.arrival) for one in counted]
    found = zip(counted, culprits(counted, slos, forced), strict=True)
    blamed = {one.job.number: what for one, what in found}
    return {
        "input_lens": [one.num_prompt_tokens for one in samples],
        "output_lens": [one.num_output_tokens for one in samples],
        "ttfts": [one.ttft_s for one in samples],
        "tpots": [one.tpot_s for one in samples],
        "e2els": [one.e2e_s for one in samples],
        "itls": [one.gaps_s for one in samples],
        "errors": [one.error or "" for one in samples],
        "sent": [one.sent_s for one in samples],
        "late": [one.late_s for one in samples],
        "blames": [blamed.get(one.job.number, "") for one in samples],
        "timings": [one.timings and dataclasses.asdict(one.timings) for one in samples],
    }


def found_json(found: Found, num_workers: int | None) -> dict[str, Any]:
    """What a search found; `too_high` is None where no rate was."""
    return {
        "goodput": found.rate,
        "goodput_per_worker": each(found.rate, num_workers),
        "too_high": found.too_high if math.isfinite(found.too_high) else None,
        "reason": found.reason,
        "decided": found.decided,
        "probes": [
            {
                "rate": one.rate,
                "num_offered": one.tally.num_offered,
                "num_good": one.tally.num_good,
                "num_unknown": one.tally.num_unknown,
                "valid": one.valid,
            }
            for one in found.probes
        ],
    }
