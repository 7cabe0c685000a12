"""Scaled loads keep what they promise, and named workloads look like the traces they come from."""

import itertools
import math
import statistics
from pathlib import Path

import pytest

from nodeserve.errors import ConfigError
from nodeserve.plan.named import NAMED, workload_named
from nodeserve.plan.records import Arrival
from nodeserve.plan.scaling import (
    cut_window,
    dispersion,
    fit_context,
    scale_lengths,
    spread_ticks,
    thin,
    traffic,
)
from nodeserve.plan.workloads import Workload, at_rate, generate, read_trace

# mean, p50, p90, p99 of the sources: inputs, then outputs (for arXiv without answers above 1,024)
TABLE = {
    "chat": ((1155, 1020, 2735, 4142), (211, 129, 424, 601)),
    "code": ((2048, 1469, 5188, 7436), (28, 13, 55, 251)),
    "summarise": ((2673, 2771, 3710, 3936), (188, 163, 318, 664)),
    "long-chat": ((12035, 6909, 27367, 85400), (343, 350, 597, 1119)),
    "reasoning": ((2474, 278, 6852, 29616), (1236, 703, 1820, 13281)),
    "sharegpt": ((216, 102, 601, 882), (203, 136, 494, 770)),
    "humaneval": ((132, 118, 227, 312), (54, 46, 107, 157)),
}
NUM = 20_000


def drawn(name: str, num: int = NUM, rate: float = 5.0) -> list[Arrival]:
    named = workload_named(name)
    return generate(Workload(rate, num, named.prompt, named.output, named.gaps, seed=1), 1 << 30)


@pytest.mark.parametrize("name", TABLE)
def test_named_workloads_have_the_statistics_of_their_source(name: str) -> None:
    requests = drawn(name)
    columns = (
        [one.num_prompt_tokens for one in requests],
        [one.num_output_tokens for one in requests],
    )
    for values, (mean, p50, p90, p99) in zip(columns, TABLE[name], strict=True):
        assert statistics.fmean(values) == pytest.approx(mean, rel=0.16 if mean == 28 else 0.12)
        for level, number in ((0.5, p50), (0.9, p90), (0.99, p99)):
            below = sum(value < number - 0.5 for value in values) / NUM
            up_to = sum(value <= number + 0.5 for value in values) / NUM
            assert below - 0.01 <= level <= up_to + 0.01


def test_every_name_is_in_the_table() -> None:
    assert set(TABLE) == set(NAMED)


def test_code_comes_in_bursts_and_the_rest_does_not() -> None:
    assert traffic(drawn("chat")).cv == pytest.approx(1.0, rel=0.05)
    bursty = traffic(drawn("code"))
    assert bursty.cv is not None and bursty.cv > 8.0
    assert bursty.rate == pytest.approx(5.0, rel=0.25)


def test_synthetic_workloads() -> None:
    named = workload_named("synthetic(512, lognormal:64)")
    assert (named.prompt.mean, named.output.mean) == (512.0, 64.0)
    for wrong in ("chats", "synthetic", "synthetic(512)", "synthetic(0,1)", "synthetic(a,b)"):
        with pytest.raises(ConfigError):
            workload_named(wrong)


def gaps(requests: list[Arrival]) -> list[float]:
    return [b.arrived_s - a.arrived_s for a, b in itertools.pairwise(requests)]


def test_another_rate_keeps_the_cv_the_order_and_the_lengths() -> None:
    requests = drawn("code", 3000)
    faster = at_rate(requests, 40.0)
    before, after = traffic(requests), traffic(faster)
    assert after.rate == pytest.approx(40.0)
    assert after.cv == pytest.approx(before.cv, rel=1e-9)
    assert [one[1:] for one in faster] == [one[1:] for one in requests]
    ratio = [b / a for a, b in zip(gaps(requests), gaps(faster), strict=True) if a]
    assert min(ratio) == pytest.approx(max(ratio), rel=1e-6)  # and no tie was made or lost
    assert sum(g == 0.0 for g in gaps(requests)) == sum(g == 0.0 for g in gaps(faster))


def test_thinning_keeps_times_and_is_nested() -> None:
    requests = drawn("chat", 5000)
    half, tenth = thin(requests, 0.5), thin(requests, 0.1)
    assert len(half) == pytest.approx(2500, rel=0.06)
    assert len(tenth) == pytest.approx(500, rel=0.15)
    assert set(tenth) <= set(half) <= set(requests)
    assert thin(requests, 1.0) == requests
    assert set(thin(requests, 0.5, seed=1)) != set(half)
    with pytest.raises(ConfigError):
        thin(requests, 0.0)


def test_thinning_keeps_what_shares_a_prefix_together() -> None:
    requests = [Arrival(i * 0.1, 2000, 5, block_ids=(0, 1 + i % 40, 1000 + i)) for i in range(400)]
    kept = thin(requests, 0.5)
    families = {one.block_ids[1] for one in kept}
    assert len(kept) == 10 * len(families) and 8 < len(families) < 32


def test_divided_lengths_are_rounded_up() -> None:
    one, other = scale_lengths([Arrival(0.0, 33, 1), Arrival(1.0, 32, 64)], 16)
    assert (one.num_prompt_tokens, one.num_output_tokens) == (3, 1)
    assert (other.num_prompt_tokens, other.num_output_tokens) == (2, 4)
    before, after = traffic(drawn("chat", 4000)), traffic(scale_lengths(drawn("chat", 4000), 8))
    assert before.prompt_tokens / before.output_tokens == pytest.approx(
        after.prompt_tokens / after.output_tokens, rel=0.02
    )


def test_what_does_not_fit_is_dropped_whole() -> None:
    requests = [Arrival(0.0, 10, 5), Arrival(1.0, 10, 6), Arrival(2.0, 100, 1)]
    assert fit_context(requests, 15) == requests[:1]
    with pytest.raises(ConfigError):
        fit_context(requests, 3)


def test_ticks_are_spread_over_their_time_in_order() -> None:
    requests = [Arrival(3.0 * (i // 10), 100 + i, 1) for i in range(3000)]
    assert traffic(requests).cv == pytest.approx(3.0, rel=0.02)
    spread = spread_ticks(requests, 3.0)
    assert [one[1:] for one in spread] == [one[1:] for one in requests]
    assert all(
        0.0 <= b.arrived_s - a.arrived_s < 3.0 for a, b in zip(requests, spread, strict=True)
    )
    assert all(gap >= 0.0 for gap in gaps(spread))
    assert traffic(spread).cv == pytest.approx(1.0, rel=0.08)


@pytest.mark.parametrize("tick_s", [0.0, 1e-320, math.inf, math.nan])
def test_ticks_that_cannot_be(tick_s: float) -> None:
    with pytest.raises(ConfigError, match="--spread-ticks"):
        spread_ticks([Arrival(3.0, 1, 1)], tick_s)


def test_a_window_starts_at_zero() -> None:
    requests = [Arrival(float(i), 1, 1) for i in range(10)]
    assert [one.arrived_s for one in cut_window(requests, 3.0, 6.0)] == [0.0, 1.0, 2.0]
    with pytest.raises(ConfigError):
        cut_window(requests, 30.0, 60.0)


def test_dispersion_of_an_even_beat_is_none_at_all() -> None:
    assert dispersion([i * 0.1 + 0.05 for i in range(200)], 1.0) == pytest.approx(0.0, abs=0.02)
    assert dispersion([0.0, 0.5], 1.0) is None
    burst = [float(i // 10) * 10 for i in range(100)]
    assert dispersion(burst, 1.0) == pytest.approx(9.0, rel=0.1)


def test_prefixes_of_a_trace_name_their_blocks(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    head = "arrival_s,input_tokens,output_tokens,prefix_row,prefix_blocks512\n"
    path.write_text(head + "0,1100,1,-1,0\n1,1500,1,0,2\n2,600,1,1,1\n3,500,1,-1,0\n")
    one, other, third, last = read_trace(path)
    assert len(one.block_ids) == 3 == len(other.block_ids) and len(third.block_ids) == 2
    assert other.block_ids[:2] == one.block_ids[:2] and other.block_ids[2] != one.block_ids[2]
    assert third.block_ids[0] == one.block_ids[0] and third.block_ids[1] not in other.block_ids
    assert not set(last.block_ids) & set(one.block_ids + other.block_ids + third.block_ids)
    path.write_text(head + "0,1100,1,5,1\n")
    with pytest.raises(ConfigError, match="line 2: prefix_row"):
        read_trace(path)


def test_math_is_not_moved_by_ties() -> None:
    """Requests that all come at once have no rate, and no CV."""
    same = traffic([Arrival(1.0, 1, 1)] * 5)
    assert same.rate is None and same.cv is None and same.iod_1s is None
    assert math.isclose(same.prompt_tokens, 1.0)
