"""`nodeserve simulate`: what it prints, and what it says about options that cannot be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nodeserve.cli import main
from nodeserve.policy.units import ADMISSIONS

SMALL = ("--requests", "60", "--rate", "20", "--layout", "2p:ep2,1d:ep2", "--output", "4")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["simulate", *arguments])


def numbers(*arguments: str) -> dict[str, object]:
    result = run(*SMALL, "--json", *arguments)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output)
    assert isinstance(answer, dict)
    return answer


def test_a_run_for_people() -> None:
    result = run(*SMALL)
    assert result.exit_code == 0
    for words in ("2p:ep2,1d:ep2  moe-ep8  60 requests", "TTFT", "device wait", "60 length"):
        assert words in result.output
    assert "per output token" in result.output and "chunk utilisation" in result.output


def test_admissions_side_by_side_see_the_same_requests() -> None:
    answer = numbers("--compare")
    summaries = answer["summaries"]
    assert isinstance(summaries, dict) and tuple(summaries) == ADMISSIONS
    assert len({one["duration_s"] for one in summaries.values()}) == 1
    assert summaries["round-robin"] != summaries["staggered"]
    table = run(*SMALL, "--compare").output
    assert all(name in table for name in ADMISSIONS) and "TTFT p99, ms" in table


def test_the_same_seed_gives_the_same_numbers() -> None:
    assert numbers("--seed", "3") == numbers("--seed", "3") != numbers("--seed", "4")


def test_settings_reach_the_node() -> None:
    options = "--admission pull --window-k 2 --max-num-seqs 7 --max-num-batched-tokens 512"
    answer = numbers(*options.split(), "--kill", "1@2.5", "--lose-reports", "0.1", "--noise", "0")
    scenario = answer["scenario"]
    assert isinstance(scenario, dict)
    dispatch = scenario["dispatch"]
    assert (dispatch["admission"], dispatch["window_k"]) == ("pull", 2.0)
    assert (dispatch["max_num_seqs"], dispatch["budget"]) == (7, 512)
    assert scenario["faults"] == {"report_loss": 0.1, "kill_instance": 1, "kill_at_s": 2.5}
    assert scenario["noise"] == 0.0


def test_slos_are_judged() -> None:
    summary = numbers("--slo", "ttft=10s,tpot=1s")["summaries"]
    assert isinstance(summary, dict) and summary["staggered"]["attained"] == 1.0
    assert "met their SLO" in run(*SMALL, "--slo", "ttft=10s").output


def test_a_trace_gives_the_requests(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = "".join(f"{0.1 * i},{100 + i},3\n" for i in range(50))
    trace.write_text("arrival_s,input_tokens,output_tokens\n" + rows)
    as_recorded = run("--trace", str(trace), "--layout", "1p1d")
    assert "50 requests, 10.0 requests/s, 124 prompt and 3 output" in as_recorded.output
    faster = run("--trace", str(trace), "--layout", "1p1d", "--rate", "40", "--requests", "20")
    assert "20 requests, 40.0 requests/s" in faster.output


def test_a_node_that_serves_nobody_says_so() -> None:
    result = run("--layout", "1p1d", "--requests", "40", "--kill", "0@0")
    assert result.exit_code == 0 and "no request was served" in result.output
    assert "worker_lost" not in run("--layout", "1p1d", "--requests", "40").output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--layout 4p", "nobody for decode"),
        ("--layout 1p:tp2,1d --profile llama-2-70b-tp8-h100", "epN"),
        ("--profile none", "no profile 'none'"),
        ("--admission none", "--admission none: use round-robin"),
        ("--decode-allocation x", "--decode-allocation x: use"),
        ("--window x", "--window x: use auto, off"),
        ("--rate 0", "--rate 0: use a number above 0"),
        ("--rate nan", "--rate nan"),
        ("--requests 0", "--requests 0: use 1 to"),
        ("--prompt zipf:3", "length 'zipf:3'"),
        ("--output 0", "length '0'"),
        ("--arrivals often", "arrivals 'often'"),
        ("--trace none.csv", "trace none.csv: No such file"),
        ("--noise 2", "--noise 2: use 0 to 1"),
        ("--lose-reports 2", "--lose-reports 2: use a share"),
        ("--kill 1", "--kill 1: use INSTANCE@SECONDS"),
        ("--kill 9@1", "no instance 9 to kill"),
        ("--kill 0@-1", "killed at -1 s: use 0 or later"),
        ("--kill 0@nan", "killed at nan s: use 0 or later"),
        ("--transit 200", "transit of 0.2 s"),
        ("--slo often", "--slo"),
        ("--max-num-seqs 0", "--max-num-seqs must be at least 1"),
    ],
)
def test_options_that_cannot_be(options: str, words: str) -> None:
    result = run(*options.split())
    assert result.exit_code == 1, result.output
    assert words in result.output and "Traceback" not in result.output
    assert len(result.output.splitlines()) == 1


def test_it_loads_nothing_large() -> None:
    script = (
        "import sys; from nodeserve.cli import main;"
        " main(['simulate', '--requests', '20', '--json'], standalone_mode=False);"
        " assert not {'torch', 'numpy', 'tokenizers', 'nodeserve._host'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_a_shape_by_formula_is_named() -> None:
    asked = ("--profile", "llama-3.1-8b-h100", "--rate", "5", "--requests", "20")
    said = run("--layout", "1p:tp2,1d", *asked).output
    assert "passes by formula, not measured (docs/instances.md): tp2\n" in said
    assert "by formula" not in run("--layout", "1p1d", *asked).output
