"""Attainment, goodput and misses by blame over sliding spans, with known answers."""

import random
from collections import Counter
from typing import Any

import pytest

from nodeserve.policy.ledger import POINT_S, SPANS_S, Ended, Ledger
from nodeserve.types import Slo, Timings

SLO = Slo(0.5, 0.05)
GOOD = Timings(scheduler_wait_s=0.1, prefill_s=0.2, decode_s=0.4)
LATE = Timings(scheduler_wait_s=0.9, prefill_s=0.2, decode_s=0.4)
SLOW = Timings(scheduler_wait_s=0.1, prefill_s=0.2, decode_s=2.0)


def one(timings: Timings = GOOD, outcome: str = "finished", **values: Any) -> Ended:
    facts = {"slo": SLO, "client_wait_s": 0.0, "num_prompt_tokens": 9, "num_output_tokens": 11}
    return Ended(request_id=1, outcome=outcome, timings=timings, **{**facts, **values})


def span(ledger: Ledger, now_s: float, seconds: int = 10) -> dict[str, Any]:
    return next(one for one in ledger.stats(now_s)["spans"] if one["seconds"] == seconds)


def test_who_meets_both_limits_is_good_and_others_have_a_reason() -> None:
    ledger = Ledger(0.0)
    for _ in range(6):
        assert ledger.ended(one(), 5.0) is None
    assert ledger.ended(one(LATE), 5.0) == "buffer"
    assert ledger.ended(one(SLOW), 5.0) == "decode"
    assert ledger.ended(one(outcome="failed"), 5.0) == "failed"
    assert ledger.ended(one(client_wait_s=0.3), 5.0) == "client", "its first token was in time"
    ledger.refused(SLO, 5.0)
    now = span(ledger, 6.0)
    assert (now["offered"], now["good"], now["attainment"]) == (11, 6, pytest.approx(6 / 11))
    assert now["missed"] == dict.fromkeys(("buffer", "decode", "failed", "client", "refused"), 1)
    assert now["goodput_per_s"] == pytest.approx(6 / 6.0)
    assert now["ended_per_s"] == pytest.approx(9 / 6.0), "neither the failed nor the refused one"
    assert ledger.stats(6.0)["total"]["offered"] == 11


def test_rates_are_of_the_time_that_requests_could_come() -> None:
    ledger = Ledger(0.0)
    ledger.begin(100.0)
    for _ in range(8):
        ledger.ended(one(), 103.0)
    for seconds in SPANS_S:
        assert span(ledger, 104.0, seconds)["goodput_per_s"] == 8 / 4.0
    assert len(ledger.stats(111.0)["series"]["attainment"]) == 2


def test_without_limits_a_request_has_times_and_is_in_no_share() -> None:
    ledger = Ledger(0.0)
    assert ledger.ended(one(LATE, slo=Slo()), 1.0) is None
    ledger.refused(Slo(), 1.0)
    now = span(ledger, 1.0)
    assert (now["offered"], now["attainment"], now["ttft_ms"]["count"]) == (0, None, 1)


def test_one_that_is_cancelled_counts_if_it_was_late_already() -> None:
    ledger = Ledger(0.0)
    waits = one(Timings(scheduler_wait_s=0.2), "cancelled", num_output_tokens=0)
    assert ledger.ended(waits, 1.0) is None and span(ledger, 1.0)["offered"] == 0
    waits = one(Timings(scheduler_wait_s=0.7), "cancelled", num_output_tokens=0)
    assert ledger.ended(waits, 1.0) == "buffer"
    now = span(ledger, 1.0)
    assert (now["offered"], now["good"], now["ended_per_s"]) == (1, 0, 0.0)
    assert now["tpot_ms"] is None and now["ttft_ms"] is None


def test_one_token_has_no_time_per_token() -> None:
    ledger = Ledger(0.0)
    assert ledger.ended(one(SLOW, num_output_tokens=1), 1.0) is None
    assert span(ledger, 1.0)["tpot_ms"] is None


def test_what_is_usual_for_long_answers_is_no_fault_of_decoding() -> None:
    """Good ones take 40 ms a token. 100 tokens in 5.1 s are slow by 1.1 s, of which the pages'
    wait is 0.7 s."""
    ledger = Ledger(0.0)
    for _ in range(50):
        ledger.ended(one(), 1.0)
    waited = Timings(prefill_s=0.2, handoff_wait_s=0.7, decode_s=5.1)
    assert ledger.ended(one(waited, num_output_tokens=101), 1.0) == "handoff wait"
    slow = Timings(prefill_s=0.2, handoff_wait_s=0.6, decode_s=6.0)
    assert ledger.ended(one(slow, num_output_tokens=101), 1.0) == "decode", "1.4 s of it"


@pytest.mark.parametrize("seed", range(5))
def test_spans_forget_what_is_older_and_nothing_else(seed: int) -> None:
    """Beside a list of everything. The last bucket of a span may be a part of one."""
    rng, ledger, seen = random.Random(seed), Ledger(100.0), list[tuple[float, str]]()
    now = 100.0
    for _ in range(3000):
        now += rng.expovariate(4.0) if rng.random() < 0.999 else rng.uniform(5, 400)
        timings = rng.choice([GOOD, GOOD, LATE, SLOW])
        seen.append((now, ledger.ended(one(timings), now) or "good"))
        if rng.random() < 0.03:
            stats = ledger.stats(now)
            for told, span_s, bucket_s in zip(
                stats["spans"], SPANS_S, (1, 1, POINT_S), strict=True
            ):
                oldest = (now // bucket_s + 1) * bucket_s - span_s
                inside = Counter(what for then, what in seen if then >= oldest)
                assert told["good"] == inside.pop("good", 0)
                assert (
                    told["missed"] == dict(inside) and told["ttft_ms"]["count"] == told["offered"]
                )
                covered_s = max(1.0, min(now - oldest, now - 100.0))
                assert told["goodput_per_s"] == pytest.approx(told["good"] / covered_s)


def test_the_curve_has_a_point_for_all_time_that_is_over() -> None:
    ledger = Ledger(1000.0)
    for timings in (GOOD, GOOD, LATE, GOOD):
        ledger.ended(one(timings), 1001.0)
    ledger.ended(one(LATE), 1012.0)
    series = ledger.stats(1016.0)["series"]
    assert series["attainment"] == [0.75, None, 0.0]
    assert series["goodput_per_s"] == [3 / POINT_S, 0.0, 0.0]
    assert series["ttft_p90_ms"][0] == pytest.approx(1100.0, rel=0.05)
    assert series["ttft_p90_ms"][1] is None and series["step_s"] == POINT_S
    assert ledger.stats(1019.0)["series"] == series, "the present point is not over"
    later = ledger.stats(1290.0)["series"]
    assert later["attainment"][:3] == [0.75, None, 0.0] and len(later["attainment"]) == 58
    assert ledger.stats(1310.0)["series"]["attainment"][0] is None, "forgotten after five minutes"
    assert ledger.stats(9000.0)["series"]["attainment"] == [None] * 59


def test_quantiles_and_histograms_are_those_of_the_times() -> None:
    rng, ledger = random.Random(0), Ledger(0.0)
    times = [rng.lognormvariate(-2.0, 1.0) for _ in range(2000)]
    for time_s in times:
        ledger.ended(one(Timings(prefill_s=time_s, decode_s=time_s)), 3.0)
    times.sort()
    now = span(ledger, 4.0, 300)
    for name, place in (("p50", 999), ("p90", 1799), ("p99", 1979)):
        assert now["ttft_ms"][name] == pytest.approx(1e3 * times[place], rel=0.05)
        assert now["tpot_ms"][name] == pytest.approx(1e2 * times[place], rel=0.05)
    histogram = ledger.stats(4.0)["histograms"]["ttft_ms"]
    assert sum(count for _, count in histogram) == 2000
    below = 0
    for highest_ms, count in histogram:
        below += count
        assert below == sum(1e3 * time_s <= highest_ms * (1 + 1e-9) for time_s in times)


def test_the_last_misses_are_told_newest_first_without_a_word_of_text() -> None:
    ledger = Ledger(0.0)
    for number in range(30):
        ledger.ended(one(LATE)._replace(request_id=number), float(number))
    misses = ledger.stats(31.0)["misses"]
    assert [miss["request"] for miss in misses] == list(range(29, 9, -1))
    assert misses[0] == {
        **{"ago_s": 2.0, "request": 29, "blame": "buffer", "prompt_tokens": 9},
        **{"ttft_ms": pytest.approx(1100.0), "tpot_ms": pytest.approx(40.0), "output_tokens": 11},
        **{"slo": {"ttft_ms": 500.0, "tpot_ms": 50.0}, "prefill_worker": -1, "decode_worker": -1},
    }
