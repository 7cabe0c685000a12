"""Arrivals and lengths: their moments, their streams, traces from files."""

import statistics
from pathlib import Path

import pytest

from nodeserve.errors import ConfigError
from nodeserve.plan import workloads
from nodeserve.plan.records import Arrival
from nodeserve.plan.workloads import (
    Workload,
    at_rate,
    generate,
    parse_gaps,
    parse_lengths,
    read_trace,
)

NUM = 8_000


def workload(prompt: str = "1500", gaps: str = "poisson", **changes: float) -> Workload:
    fields = {"rate": 10.0, "seed": 3, **changes}
    return Workload(
        rate=fields["rate"],
        num_requests=NUM,
        prompt=parse_lengths(prompt),
        output=parse_lengths("lognormal:200"),
        gaps=parse_gaps(gaps),
        seed=int(fields["seed"]),
    )


@pytest.mark.parametrize(("text", "cv"), [("poisson", 1.0), ("gamma:3", 3.0), ("gamma:0", 0.0)])
def test_gaps_have_their_mean_and_spread(text: str, cv: float) -> None:
    times = [one.arrived_s for one in generate(workload(gaps=text), 32_768)]
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert statistics.mean(gaps) == pytest.approx(0.1, rel=0.08)
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.08, abs=1e-9)


@pytest.mark.parametrize(
    ("text", "tolerance"),
    [
        ("1500", 0.0),
        ("fixed:1500", 0.0),
        ("lognormal:1500", 0.02),
        ("lognormal:1500:0.3", 0.02),
        ("pareto:1500", 0.08),
        ("pareto:1500:1", 0.08),
        ("pareto:1500:2.5:8000", 0.04),
    ],
)
def test_lengths_have_their_mean(text: str, tolerance: float) -> None:
    prompts = [one.num_prompt_tokens for one in generate(workload(text), 1 << 20)]
    assert statistics.mean(prompts) == pytest.approx(1500, rel=tolerance)


def test_a_pareto_length_is_bounded_and_has_a_heavy_tail() -> None:
    prompts = sorted(one.num_prompt_tokens for one in generate(workload("pareto:1500"), 1 << 20))
    assert prompts[-1] <= 32_768
    assert sum(prompts[-NUM // 100 :]) > 0.1 * sum(prompts)


def test_rates_and_arms_see_the_same_requests() -> None:
    slow, fast = generate(workload(rate=1.0), 4096), generate(workload(rate=4.0), 4096)
    for one, other in zip(slow[:100], fast, strict=False):
        assert other.arrived_s == pytest.approx(one.arrived_s / 4)
        assert other[1:] == one[1:]
    other_prompts = generate(workload("lognormal:900", rate=1.0), 4096)
    assert [one.arrived_s for one in other_prompts] == [one.arrived_s for one in slow]
    assert [one.num_output_tokens for one in other_prompts] == [
        one.num_output_tokens for one in slow
    ]
    assert generate(workload(seed=4), 4096) != generate(workload(), 4096)


def test_requests_fit_the_context() -> None:
    for one in generate(workload("pareto:1500"), 2048)[:2000]:
        assert one.num_prompt_tokens + one.num_output_tokens <= 2048


@pytest.mark.parametrize(
    "text", ["", "x", "0", "lognormal", "lognormal:1500:9", "lognormal:a", "pareto:40000", "fixed:"]
    + ["pareto:1500:0", "lognormal:1500:0.8:3", "nan", "fixed:inf", "zipf:3"],
)  # fmt: skip
def test_a_length_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ConfigError, match="lognormal:MEAN"):
        parse_lengths(text)


@pytest.mark.parametrize("text", ["", "gamma", "gamma:x", "gamma:-1", "uniform", "poisson:2"])
def test_gaps_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ConfigError, match="gamma:CV"):
        parse_gaps(text)


def test_a_trace_is_read_sorted_and_scaled(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,input_tokens,output_tokens,more\n7,10,2,x\n5.0,20,3,y\n6,30,4,z\n")
    arrivals = read_trace(path)
    assert arrivals == [Arrival(0.0, 20, 3), Arrival(1.0, 30, 4), Arrival(2.0, 10, 2)]
    assert [one.arrived_s for one in at_rate(arrivals, 4.0)] == [0.0, 0.25, 0.5]
    assert len(read_trace(path, 2)) == 2


PREFIXED = "arrival_s,input_tokens,output_tokens,prefix_row,prefix_blocks512"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("time,input_tokens,output_tokens\n1,2,3\n", "no column 'arrival_s'"),
        ("arrival_s,input_tokens,output_tokens\n", "has no requests"),
        ("arrival_s,input_tokens,output_tokens\n1,2,3\n1,x,3\n", "line 3: .* must be numbers"),
        ("arrival_s,input_tokens,output_tokens\n1,2\n", "line 2: .* must be numbers"),
        ("arrival_s,input_tokens,output_tokens\n1,0,3\n", "line 2: .* from 1 token to"),
        ("arrival_s,input_tokens,output_tokens\n1,1e18,3\n", "line 2: .* from 1 token to 16777216"),
        (f"{PREFIXED}\n0,600,5,-1,0\n\n1,1200,5,0", "line 4: prefix_row must be"),
        (f"{PREFIXED}\n0,600,5,-1,0\n1,1200,5,x,0", "line 3: prefix_row must be"),
        (f"{PREFIXED}\n0,600,5,-1,0\n1,1200,5,0,-1", "line 3: prefix_blocks512 must be"),
    ],
)
def test_a_trace_that_cannot_be_read(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_trace(path)


def test_the_blocks_of_a_trace_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of 10^18 tokens took all memory for the numbers of its blocks."""
    monkeypatch.setattr(workloads, "MAX_TRACE_BLOCKS", 5)
    path = tmp_path / "trace.csv"
    path.write_text(f"{PREFIXED}\n0,1024,5,-1,0\n1,1500,5,0,1\n")
    assert [one.block_ids for one in read_trace(path)] == [(0, 1), (0, 2, 3)]
    path.write_text(f"{PREFIXED}\n0,1024,5,-1,0\n1,1500,5,0,1\n2,1,1,-1,0\n")
    with pytest.raises(ConfigError, match="line 4: more than 5 blocks"):
        read_trace(path)


def test_a_trace_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_trace(tmp_path / "none.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="no CSV file"):
        read_trace(tmp_path / "bytes.csv")


def test_simultaneous_arrivals_have_no_rate() -> None:
    with pytest.raises(ConfigError, match="no rate"):
        at_rate([Arrival(1.0, 1, 1)] * 3, 2.0)
