"""Requests of a run and their prompts: exact lengths, the same at any rate, new in every run."""

from pathlib import Path

import numpy as np
import pytest

from nodeserve.cli.bench import arrivals_words
from nodeserve.errors import ConfigError, InvalidRequest
from nodeserve.loadgen.bench import Result
from nodeserve.loadgen.prompts import id_range, rough_text, text_prompt, token_ids
from nodeserve.loadgen.records import Job
from nodeserve.plan.records import Arrival
from nodeserve.plan.requests import Requests, Source, described
from nodeserve.plan.scaling import traffic


def job(num_tokens: int, number: int = 0, block_ids: tuple[int, ...] = ()) -> Job:
    return Job(number, Arrival(0.0, num_tokens, 1, block_ids=block_ids))


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 700])
def test_ids_are_as_many_as_asked_and_ordinary(num_tokens: int) -> None:
    ids = token_ids(job(num_tokens), 1, 49152, 16)
    low, high = id_range(49152)
    assert len(ids) == num_tokens and ids.dtype == np.int32
    assert ids.min() >= low and ids.max() < high
    assert np.array_equal(ids, token_ids(job(num_tokens), 1, 49152, 16))
    assert num_tokens < 4 or not np.array_equal(ids, token_ids(job(num_tokens), 2, 49152, 16))


def test_shared_blocks_give_shared_beginnings() -> None:
    one = token_ids(job(100, 1, (7, 8, 9)), 1, 1000, 32)
    other = token_ids(job(90, 2, (7, 8, 5)), 1, 1000, 32)
    assert np.array_equal(one[:64], other[:64]) and not np.array_equal(one[64:90], other[64:90])
    assert len(one) == 100 and len(other) == 90
    assert not np.array_equal(one[:32], token_ids(job(100, 1, (7, 8, 9)), 2, 1000, 32)[:32])


def count_words(text: str) -> int:
    """Five tokens of a template; long words are two."""
    return 5 + sum(2 if len(word) > 5 else 1 for word in text.split())


@pytest.mark.parametrize("num_tokens", [6, 7, 8, 11, 64, 333, 2000])
def test_texts_have_exactly_the_tokens_asked_for(num_tokens: int) -> None:
    calls = []

    def count(text: str) -> int:
        calls.append(text)
        return count_words(text)

    text = text_prompt(job(num_tokens), 1, count)
    assert count_words(text) == num_tokens
    assert len(calls) < 32  # each costs milliseconds


def test_a_text_that_cannot_be_so_short() -> None:
    with pytest.raises(InvalidRequest, match="exactly 3 tokens.*there are 5"):
        text_prompt(job(3), 1, count_words)
    assert len(rough_text(job(30), 1).split()) == 30


def test_longer_runs_begin_with_the_requests_of_shorter_ones() -> None:
    requests = Requests(Source("chat", seed=3))
    short, long = requests.first(50, 2.0), requests.first(400, 8.0)
    assert [one[1:] for one in short] == [one[1:] for one in long[:50]]
    times = [4 * one.arrived_s for one in long[:50]]
    assert [one.arrived_s for one in short] == pytest.approx(times)
    assert traffic(requests.first(4000, 8.0)).rate == pytest.approx(8.0, rel=0.05)
    other = Requests(Source("chat", seed=4)).first(50, 2.0)
    assert [one[1:] for one in other] != [one[1:] for one in short]
    with pytest.raises(ConfigError):
        requests.first(5)
    with pytest.raises(ConfigError):
        requests.first(5, 0.0)


def test_what_does_not_fit_is_replaced_by_later_requests() -> None:
    requests = Requests(Source("chat"), max_tokens=1024)
    chosen = requests.first(300, 5.0)
    assert len(chosen) == 300 and 0.3 < requests.dropped_share < 0.8
    assert all(one.num_prompt_tokens + one.num_output_tokens <= 1024 for one in chosen)
    cv = traffic(chosen).cv
    assert cv is not None and cv == pytest.approx(1.0, abs=0.2)
    scaled = Requests(Source("chat", divisor=64.0), max_tokens=1024)
    assert len(scaled.first(100, 1.0)) == 100 and scaled.dropped_share == 0.0


def test_a_trace_is_cut_spread_thinned_and_scaled(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    rows = [f"{3 * (i // 10)},{100 + i},{1 + i % 50}" for i in range(1000)]
    path.write_text("arrival_s,input_tokens,output_tokens\n" + "\n".join(rows))
    source = Source(trace=path, tick_s=3.0, from_s=30.0, to_s=120.0, share=0.5, divisor=10.0)
    requests = Requests(source)
    assert requests.num_available == pytest.approx(150, abs=40)
    assert requests.own_rate == pytest.approx(300 / 90 / 2, rel=0.3)
    chosen = requests.first(1 << 20)
    assert chosen[0].arrived_s == 0.0 and chosen[-1].arrived_s < 90.0
    assert all(20 <= one.num_prompt_tokens <= 60 for one in chosen)
    told = described(source, requests, chosen, None)
    assert told["divisor"] == 10.0 and told["share"] == 0.5 and told["workload"] == str(path)
    assert "gaps" not in told and told["num_requests"] == len(chosen)
    assert Source(divisor=10.0).block_tokens == 52 and Source().block_tokens == 512


def test_a_rate_is_of_the_whole_trace(tmp_path: Path) -> None:
    """Ten requests in a second, then one every ten: the first ten alone are a hundred times faster
    than the whole, and stay so at any rate."""
    path = tmp_path / "trace.csv"
    times = [0.1 * place for place in range(10)] + [1.0 + 10.0 * place for place in range(1, 11)]
    rows = [f"{time_s},10,3" for time_s in times]
    path.write_text("arrival_s,input_tokens,output_tokens\n" + "\n".join(rows))
    source = Source(trace=path)
    requests = Requests(source)
    few, all_ = requests.first(10, 2.0), requests.first(20, 2.0)
    assert few == all_[:10]
    assert traffic(all_).rate == pytest.approx(2.0)
    divisor = requests.times_divided_by(2.0)
    assert divisor == pytest.approx(2.0 / (19 / 101.0))
    told = described(source, requests, few, 2.0)
    assert told["times_divided_by"] == divisor and told["rate"] == pytest.approx(10 * divisor)
    assert described(source, requests, few, None)["times_divided_by"] == 1.0
    result = Result(2.0, few, None, [])  # type: ignore[arg-type]
    assert arrivals_words(result, requests).endswith("times divided by 10.6")


def test_requests_that_all_come_at_once_have_no_rate(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n0,10,3\n0,12,4\n")
    with pytest.raises(ConfigError, match="no rate to change"):
        Requests(Source(trace=path)).first(2, 1.0)


@pytest.mark.parametrize("seed", range(8))
def test_a_few_requests_that_are_left_out_are_not_all(seed: int) -> None:
    """Whoever looks at the first draws alone may find that none fits."""
    assert len(Requests(Source("long-chat", seed=seed), 4096).first(10, 1.0)) == 10


def test_where_none_fits_that_is_said() -> None:
    with pytest.raises(ConfigError, match="no request fits a context of 100"):
        Requests(Source("synthetic(500,8)"), 100)


def test_requests_without_a_schedule_may_all_arrive_at_once(tmp_path: Path) -> None:
    """Coarse timestamps: the first two, which warm a server up, have no rate."""
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n0,10,3\n0,12,4\n3,14,5\n")
    requests = Requests(Source(trace=path))
    assert [one.num_prompt_tokens for one in requests.some(2)] == [10, 12]
    assert len(requests.some(9)) == 3
    assert len(Requests(Source("chat")).some(5000)) == 5000
