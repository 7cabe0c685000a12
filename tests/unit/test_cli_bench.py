"""`nodeserve bench`: what it understands, and what it says about options that cannot be."""

import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from nodeserve.cli import main
from nodeserve.cli.bench import verdict
from nodeserve.cli.bench_options import (
    BenchCommand,
    bench_options,
    limits_for,
    rates_of,
    run_options,
    search_options,
    target_options,
)
from nodeserve.cli.bench_progress import Progress, live_line
from nodeserve.cli.sources import source_of
from nodeserve.errors import ConfigError
from nodeserve.loadgen.limits import Limits
from nodeserve.plan.goodput import Slo, Tally
from nodeserve.plan.search import Found, Probe


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", *arguments])


def parsed(*arguments: str) -> dict[str, Any]:
    """The options as the command gets them."""
    found: dict[str, Any] = {}

    @click.command(cls=BenchCommand)
    @bench_options
    def command(**options: Any) -> None:
        found.update(options)

    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ("--goodput", "ttft:200", "tpot:50", "--rate", "3"),
        ("--goodput", "ttft:200", "--rate", "3", "--goodput", "tpot:50"),
        ("--rate", "3", "--goodput", "ttft:200 tpot:50"),
    ],
)
def test_goodput_takes_several_words(arguments: tuple[str, ...]) -> None:
    options = parsed(*arguments)
    assert limits_for(options).slo(None, None) == Slo(0.2, 0.05)  # type: ignore[arg-type]
    assert rates_of(options) == [3.0]


def test_limits_are_the_workloads_own_unless_given() -> None:
    assert limits_for(parsed("--workload", "chat")).words() == "ttft:2000 tpot:100"
    assert limits_for(parsed("--trace", "x.csv")) == Limits()
    assert limits_for(parsed("--workload", "synthetic(8,2)")) == Limits()


def test_options_reach_the_source_and_the_target() -> None:
    words = "--trace t.csv --thin 0.5 --scale-lengths 16 --spread-ticks 3 --window 810: --seed 4"
    source = source_of(parsed(*words.split()))
    assert (source.trace, source.share, source.divisor) == (Path("t.csv"), 0.5, 16.0)
    assert (source.tick_s, source.from_s, source.to_s) == (3.0, 810.0, float("inf"))
    assert source.seed == 4 and source.block_tokens == 32
    options = parsed("--url", "http://x:1", "--api", "chat", "--stop-at-eos")
    target = target_options(options, source, Limits())
    assert (target.url, target.api, target.ignore_eos) == ("http://x:1", "chat", False)
    assert target.block_tokens == 32
    assert not run_options(options, Limits()).forced and run_options(parsed(), Limits()).forced


def test_a_key_goes_to_urls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    options = parsed("--url", "http://x:1")
    headers = target_options(options, source_of(options), Limits()).headers
    assert headers == {"Authorization": "Bearer k"}
    assert target_options(parsed(), source_of(parsed()), Limits()).headers == {}


def test_a_search_asks_no_more_than_a_trace_has() -> None:
    options = parsed("--requests", "500", "--max-requests", "1000")
    assert search_options(options, 2.0, None).min_requests == 500
    assert search_options(options, 2.0, 300).min_requests == 300
    assert search_options(options, 2.0, 300).max_requests == 300
    assert search_options({**options, "duration": 60.0}, 2.0, None).min_duration_s == 60.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "at which rate?"),
        (("--rate", "0"), "numbers above 0"),
        (("--rate", "1,2"), "several are a --sweep"),
        (("--sweep", "1,2", "--find-goodput"), "do not go together"),
        (("--rate", "1", "--goodput", "itl:5"), "--goodput itl:5"),
        (("--rate", "1", "--workload", "chit"), "no workload 'chit'"),
        (("--rate", "1", "--goal", "1.5"), "--goal 1.5"),
        (("--rate", "1", "--confidence", "0.9999999999999999"), "--confidence 1"),
        (("--rate", "1", "--scale-lengths", "0"), "lengths divided by 0"),
        (("--rate", "1", "--scale-lengths", "nan"), "lengths divided by nan"),
        (("--rate", "1", "--scale-lengths", "1e-300"), "lengths divided by 1e-300"),
        (("--rate", "1", "--settle", "-1"), "--settle -1"),
        (("--rate", "1", "--thin", "0.5"), "--thin keeps some of a --trace's requests"),
        (("--rate", "1", "--window", "1:9"), "--window is for a --trace"),
        (("--trace", "t.csv", "--window", "9:1"), "--window 9:1"),
        (("--trace", "t.csv", "--arrivals", "poisson"), "--arrivals is for workloads"),
        (("--rate", "1", "--concurrency", "2"), "--rate and --concurrency"),
        (("--rate", "1", "--sweep", "2,3"), "--rate and --sweep"),
        (("--find-goodput", "--tolerance", "nan"), "--tolerance nan"),
        (("--find-goodput", "--tolerance", "0"), "--tolerance 0"),
        (("--find-goodput", "--min-rate", "-5"), "--min-rate -5"),
        (("--rate", "1", "--min-rate", "0.5"), "--min-rate is for --find-goodput"),
        (("--rate", "1", "--max-rate", "5"), "--max-rate is for --find-goodput"),
        (("--rate", "1", "--tolerance", "0.1"), "--tolerance is for --find-goodput"),
        (("--rate", "1", "--max-requests", "5"), "--max-requests is for --find-goodput"),
        (("--rate", "1", "--requests", "5", "--duration", "9"), "both say how many"),
        (("--rate", "1", "--details"), "--details goes into JSON"),
        (("--trace", "t.csv", "--workload", "chat"), "--workload and --trace"),
        (("--rate", "1", "--text"), "--text is for --url"),
        (("--rate", "1", "--tokenizer", "x"), "--tokenizer is for --url"),
        (("--rate", "1", "--model", "x"), "--model is for --url"),
        (("--rate", "1", "--url", "http://a", "--api", "chat", "--text"), "--text is for --api"),
        (("--rate", "1", "--goodput", "e2el:9", "--tell-slo"), "--tell-slo is for limits of"),
        (("--find-goodput", "--duration", "nan"), "--duration nan"),
        (("--find-goodput", "--workload", "synthetic(8,2)"), "--find-goodput needs limits"),
        (("--rate", "1", "--save", "/"), "cannot write /"),
        (("--rate", "1", "--extra-body", "[1]"), "JSON object"),
        (("--rate", "1", "--url", "http://a", "--socket", "b"), "use one of them"),
        (("--rate", "1", "--goodput", "ttft:3x", "--tell-slo"), "--tell-slo"),
    ],
)
def test_options_that_cannot_be(arguments: tuple[str, ...], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1 and words in result.output


def test_figures_need_matplotlib_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("--rate", "1", "--figures", "somewhere")
    assert result.exit_code == 1 and "nodeserve[plot]" in result.output


def test_a_line_while_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    class Run:
        rate, num_requests, num_ended, num_good, began_s = 4.0, 40, 10, 8, 100.0

        def num_due(self, now_s: float) -> int:
            return 13

    line = live_line(Run(), 103.2)  # type: ignore[arg-type]
    assert line == "4/s  3 s  3 running  10 of 40 ended  80% good"
    with Progress(watched=False) as progress:
        progress.say("warming up")
    assert capsys.readouterr().err == "warming up\n"


def test_the_verdict_of_a_search() -> None:
    probes = [Probe(4.0, Tally(100, 95))]
    found = Found(4.0, 4.2, "found", False, probes)
    assert verdict(found, 2).startswith("goodput 4 requests/s, 2 a worker; 4.2 is too much")
    assert "not with the stated confidence" in verdict(found, 2)
    assert "--processes" in verdict(Found(4.0, float("inf"), "invalid", True, probes), None)
    late = verdict(Found(0.0, float("inf"), "invalid", True, probes), None)
    assert late.startswith("goodput unknown (the clients could not"), "no rate was measured"


def test_config_errors_are_typed() -> None:
    with pytest.raises(ConfigError):
        rates_of(
            {"sweep": "a", "rate": None, "trace": None, "concurrency": None, "find_goodput": 0}
        )
