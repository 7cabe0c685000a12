"""From samples to numbers: times, joint attainment, blame, and runs that do not count."""

import math

import pytest

from nodeserve.errors import ConfigError
from nodeserve.loadgen.bench import Bench, BenchOptions, Live, Result
from nodeserve.loadgen.limits import limits_of, parse_limits
from nodeserve.loadgen.measure import Report, measure, needed, punctuality
from nodeserve.loadgen.records import Job, Sample, Unloaded
from nodeserve.loadgen.report import details_json, result_json
from nodeserve.plan.goodput import Slo, Tally
from nodeserve.plan.records import Arrival
from nodeserve.plan.search import SearchOptions
from nodeserve.types import Timings

SLO = Slo(0.2, 0.05)


def sample(
    number: int = 0, ttft_s: float = 0.1, tpot_s: float = 0.02, num: int = 11, **changes: object
) -> Sample:
    """Due at its number of seconds, sent then."""
    due_s = float(number)
    made = Sample(Job(number, Arrival(due_s, 100, num)), due_s, due_s)
    made.times = [due_s + ttft_s + tpot_s * place for place in range(num)]
    made.counts = [1] * num
    made.ended_s = made.times[-1]
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def report_of(samples: list[Sample], **changes: float) -> Report:
    report = measure(samples, lambda arrival: SLO, 0.9, **changes)  # type: ignore[arg-type]
    assert report is not None
    return report


def test_the_times_of_a_sample() -> None:
    one = sample(3, num=21)
    assert one.ttft_s == pytest.approx(0.1) and one.tpot_s == pytest.approx(0.02)
    assert one.e2e_s == pytest.approx(0.5) and len(one.gaps_s) == 20
    single = sample(num=1)
    assert single.tpot_s is None and single.worst_gap_s is None and single.gaps_s == []
    none = sample(times=[], counts=[])
    assert none.ttft_s is None and none.e2e_s is None and none.tpot_s is None


def test_tokens_that_come_together_have_no_gap_between_them() -> None:
    one = sample(times=[0.1, 0.3, 0.6], counts=[2, 1, 3])
    assert one.gaps_s == pytest.approx([0.0, 0.2, 0.3, 0.0, 0.0])
    assert one.tpot_s == pytest.approx(0.5 / 5)
    told = sample(times=[0.1, 0.3, 0.6], counts=[1, 1, 1], told_output_tokens=6)
    assert told.tpot_s == pytest.approx(0.5 / 5)  # the server's own count


def test_the_worst_gap_is_the_mean_of_the_longest_tenth() -> None:
    gaps = [0.01] * 18 + [0.1, 0.3]
    times = [sum(gaps[:place]) for place in range(21)]
    assert sample(times=times, counts=[1] * 21).worst_gap_s == pytest.approx(0.2)


def test_percentiles_and_attainment() -> None:
    """TTFTs of 10 to 1000 ms: percentiles lie on straight lines between samples."""
    samples = [sample(i, ttft_s=0.01 * (i + 1)) for i in range(100)]
    report = report_of(samples)
    assert report.ttft is not None and report.tpot is not None
    assert report.ttft.p50 == pytest.approx(0.505) and report.ttft.p90 == pytest.approx(0.901)
    assert report.ttft.p99 == pytest.approx(0.9901) and report.ttft.mean == pytest.approx(0.505)
    assert report.ttft.std == pytest.approx(0.01 * math.sqrt((100**2 - 1) / 12))
    assert (report.tally.num_offered, report.tally.num_good) == (100, 20)
    assert report.offered_per_s == pytest.approx(1.0)
    assert report.duration_s == pytest.approx(99 + 1.0 + 0.2)
    assert report.goodput_per_s == pytest.approx(20 / 100.2)
    assert report.good_tokens == 20 * 11 and report.output_tokens == 1100
    assert report.smallest_scale == pytest.approx(0.9 / 0.2)
    assert report.missed == {"ttft": 80} and report.blame == {"unknown": 80}


def test_failures_are_misses_whatever_their_times() -> None:
    samples = [sample(i) for i in range(8)]
    samples += [sample(8, error="overloaded", times=[]), sample(9, error="timeout")]
    report = report_of(samples)
    assert report.tally.share == 0.8 and report.num_done == 8
    assert report.errors == {"overloaded": 1, "timeout": 1} == report.blame
    assert report.missed == {"failed": 2}
    assert report.smallest_scale is None  # at any scale a tenth more fails than may


def test_an_answer_cut_short_is_a_miss_where_lengths_are_forced() -> None:
    """One token alone would have no TPOT to miss."""
    samples = [sample(i) for i in range(8)]
    samples += [sample(i, times=[i + 0.1], counts=[1]) for i in (8, 9)]
    report = report_of(samples)
    assert report.tally.share == 0.8 and report.num_done == 10 and report.num_short == 2
    assert report.missed == {"short": 2} == report.blame and report.smallest_scale is None
    free = report_of(samples, forced=False)
    assert free.tally.share == 1.0 and free.blame == {} and free.smallest_scale is not None


def test_limits_hold_from_the_due_time_on() -> None:
    """Answered 150 ms after it was sent, but sent 100 ms late: its user waited for 250 ms."""
    samples = [sample(i, timings=Timings(prefill_s=0.1)) for i in range(9)]
    samples.append(sample(9, 0.25, sent_s=9.1, timings=Timings(prefill_s=0.14)))
    report = report_of(samples)
    assert report.missed == {"ttft": 1} and report.blame == {"outside": 1}
    assert report.ttft is not None and report.ttft.p99 < 0.16  # as others count it
    assert needed(samples[9], SLO) == pytest.approx(0.25 / 0.2)


def test_both_limits_are_joint() -> None:
    late, slow = [sample(i, 0.3) for i in range(2)], [sample(i, tpot_s=0.06) for i in range(2, 5)]
    report = report_of([*late, *slow, *(sample(i) for i in range(5, 10))])
    assert report.tally.share == 0.5 and report.missed == {"tpot": 3, "ttft": 2}


def test_the_first_seconds_may_be_left_out() -> None:
    samples = [sample(i, 0.9 if i < 4 else 0.1) for i in range(10)]
    report = report_of(samples, settle_s=4.0)
    assert (report.tally.num_offered, report.tally.share) == (6, 1.0)
    assert measure(samples, lambda arrival: SLO, 0.9, settle_s=10.0) is None


def test_what_does_not_count_does_not_end_a_run() -> None:
    """Ten requests, of which the first four are late while the server settles."""

    class Runs:
        options = BenchOptions(parse_limits(["ttft:200"]), settle_s=4.0)

        def on_news(self, live: Live) -> None: ...

        def slo_of(self, arrival: Arrival) -> Slo:
            return SLO

    samples = [sample(i, 0.9 if i < 4 else 0.1) for i in range(10)]
    live = Live(Runs(), 1.0, [one.job.arrival for one in samples], 0.95)  # type: ignore[arg-type]
    live.ended(samples[:4])
    assert not live.give_up() and (live.num_ended, live.num_good) == (4, 0)
    live.ended([sample(i, 0.9) for i in range(4, 8)])
    assert live.give_up()


@pytest.mark.parametrize(("settle_s", "num"), [(0.0, 50), (3.0, 200)])
async def test_a_probe_has_its_requests_beside_those_that_settle(settle_s: float, num: int) -> None:
    asked: list[int] = []

    class Asked(Bench):
        async def run(self, rate: float | None, num: int, end_early: float | None = None) -> Result:
            asked.append(num)
            samples = [sample(i) for i in range(10)]
            return Result(rate, [], report_of(samples), samples)

    bench = Asked(None, None, BenchOptions(parse_limits([]), settle_s=settle_s))  # type: ignore[arg-type]
    await bench.search(SearchOptions(start=50.0, high=50.0, min_requests=50, max_probes=1))
    assert asked == [num]


def test_the_stage_that_took_more_than_usual_is_to_blame() -> None:
    usual = Timings(scheduler_wait_s=0.01, prefill_s=0.08, decode_s=0.2)
    queued = Timings(scheduler_wait_s=0.2, prefill_s=0.09, decode_s=0.2)
    handed = Timings(scheduler_wait_s=0.01, prefill_s=0.08, handoff_wait_s=0.7, decode_s=0.9)
    slowly = Timings(scheduler_wait_s=0.01, prefill_s=0.08, decode_s=0.9)
    samples = [sample(i, timings=usual) for i in range(9)]
    longest = Timings(scheduler_wait_s=0.07, prefill_s=0.085, decode_s=0.2)  # but as ever
    samples += [
        sample(9, 0.3, timings=queued),
        sample(13, 0.21, timings=longest),
        sample(10, tpot_s=0.09, timings=handed),
        sample(11, tpot_s=0.09, timings=slowly),
        sample(12, 0.4, timings=usual),  # the server was done long before
    ]
    assert report_of(samples).blame == {
        **{"buffer": 2, "handoff wait": 1, "decode": 1, "outside": 1}
    }


def test_a_client_that_was_late_makes_a_run_invalid() -> None:
    samples = [sample(i) for i in range(100)]
    assert punctuality(samples, [0.001] * 50).valid
    for one in samples[:2]:
        one.sent_s += 0.011
    late = punctuality(samples, [])
    assert not late.valid and "2% of the requests" in late.reasons[0]
    assert late.late_max_s == pytest.approx(0.011) and late.late_share == 0.02
    assert punctuality(samples, [], max_late_s=0.02).valid
    busy = punctuality(samples[2:], [0.001] * 90 + [0.05] * 10)
    assert not busy.valid and "woke up" in busy.reasons[0]


def test_what_an_early_end_left_unknown_is_neither_missed_nor_punctual() -> None:
    """Of 200 requests 20 were answered late; 30 ran, and 150 were to come, when the run was cut."""
    samples = [sample(i, 0.9, sent_s=i + 0.02 * (i < 1)) for i in range(20)]
    samples += [sample(i, times=[], counts=[], error="given_up") for i in range(20, 50)]
    samples += [sample(i, times=[], counts=[], error="unsent") for i in range(50, 200)]
    report = report_of(samples)
    assert report.tally == Tally(20, 0, 180) and report.tally.interval()[1] > 0.8
    assert report.blame == {"unknown": 20} and report.missed == {"ttft": 20}
    assert report.errors == {} and report.smallest_scale is None
    assert report.punctuality.late_share == pytest.approx(1 / 50)
    assert not report.punctuality.valid  # one of 200 would be few
    assert measure(samples[20:], lambda arrival: SLO, 0.9) is None


def test_limits_as_people_write_them() -> None:
    limits = parse_limits(["ttft:200 tpot:50"])
    assert limits.slo(Arrival(0.0, 1, 1), None) == Slo(0.2, 0.05) and not limits.relative
    assert limits.words() == "ttft:200 tpot:50" and limits_of(Slo(0.2, 0.05)) == limits
    alone = Unloaded(((100, 0.01), (300, 0.03)), 0.004)
    mixed = parse_limits(["ttft:5x", "tpot:50", "e2el:2x"])
    slo = mixed.slo(Arrival(0.0, 200, 11), alone)
    assert slo.ttft_s == pytest.approx(0.1) and slo.tpot_s == 0.05
    assert (
        slo.e2e_s == pytest.approx(2 * (0.02 + 0.04)) and mixed.words() == "ttft:5x tpot:50 e2el:2x"
    )
    for wrong in ("ttft", "ttft:0", "ttft:-1", "ttft:x", "itl:5", "ttft:1 ttft:2", "tpot:nan"):
        with pytest.raises(ConfigError, match="--goodput"):
            parse_limits([wrong])


def test_unloaded_times_lie_on_lines_between_the_points() -> None:
    alone = Unloaded(((100, 0.01), (300, 0.03)), 0.004)
    times = [alone.ttft_s(num) for num in (10, 100, 150, 300, 600)]
    assert times == pytest.approx([0.01, 0.01, 0.015, 0.03, 0.06])
    assert Unloaded(((100, 0.01),), 0.0).ttft_s(200) == pytest.approx(0.02)


def test_json_has_the_names_that_others_know() -> None:
    samples = [sample(i, 0.1 if i % 2 else 0.3) for i in range(10)]
    arrivals = [one.job.arrival for one in samples]
    result = Result(1.0, arrivals, report_of(samples), samples)
    told = result_json(result, 0.95, 2)
    assert told["completed"] == 10 and told["total_output_tokens"] == 110
    assert told["median_ttft_ms"] == pytest.approx(200.0) == told["p50_ttft_ms"]
    assert told["p99_tpot_ms"] == pytest.approx(20.0) and told["mean_e2el_ms"] > 0
    assert told["std_itl_ms"] == pytest.approx(0.0, abs=1e-6)
    assert told["attainment"] == 0.5 and told["attainment_interval"][0] < 0.5
    assert told["request_goodput_per_worker"] == pytest.approx(told["request_goodput"] / 2)
    assert result_json(result, 0.95, None)["request_goodput_per_worker"] is None
    assert told["valid"] is True
    details = details_json(result, lambda arrival: SLO)
    assert details["blames"] == ["unknown", ""] * 5
    assert details_json(result, lambda arrival: SLO, 3.0)["blames"][:5] == [
        "",
        "",
        "",
        "",
        "unknown",
    ]
    assert details["ttfts"] == pytest.approx([0.3, 0.1] * 5) and len(details["itls"][0]) == 10
