"""`nodeserve plan`, and the plan that `start --layout auto` makes, on a cost model of a file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from nodeserve import profile_store
from nodeserve.cli import auto, main
from nodeserve.cli.plan import eps_of, trace_of
from nodeserve.config import EngineConfig
from nodeserve.coordinator.placement import check_device
from nodeserve.errors import ConfigError
from nodeserve.gpus import Gpus
from nodeserve.plan import planner
from nodeserve.plan.planner import Effort
from nodeserve.policy.cost import StepCost
from nodeserve.policy.profiles import PROFILES

TINY = Effort(30, 60, 120, 1, 0.2, 0)
MINE = replace(
    PROFILES["llama-3.1-8b-h100"],
    name="mine",
    cost=StepCost(0.010, 0.010, 1e-4, 0.0, 1e-5, 0.0),
    noise=0.0,
    max_num_batched_tokens=1024,
    max_num_seqs=64,
)
ASKED = (
    *("plan", "some/model", "--profile", "mine", "--gpus", "2"),
    *("--workload", "synthetic(500,4)", "--slo", "ttft=1s,tpot=1s"),
    *("--effort", "quick", "--processes", "1"),
)


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODESERVE_PROFILES", str(tmp_path))
    monkeypatch.setitem(planner.EFFORTS, "quick", TINY)
    monkeypatch.setattr(auto, "EFFORT", TINY)
    profile_store.write(MINE, {"threads": 1})


def run(*words: str) -> str:
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    return result.output


def test_it_prints_a_ranking_the_reason_and_the_command() -> None:
    said = run(*ASKED)
    assert "mine on 2 GPUs, synthetic(500,4); 90% of the requests" in said
    assert "do not disaggregate: 2m serves" in said
    assert (
        "nodeserve start some/model --layout 2m --max-num-seqs 64 --max-num-batched-tokens" in said
    )
    assert "--slo ttft=1000ms,tpot=1000ms" in said


def test_numbers_for_a_program() -> None:
    numbers = json.loads(run(*ASKED, "--json"))
    assert numbers["best"] == "2m"
    assert numbers["verdict"]["disaggregate"] is False
    rows = numbers["ranked"]
    assert [row["goodput"] for row in rows] == sorted(
        (row["goodput"] for row in rows), reverse=True
    )
    assert {row["kind"] for row in rows} == {"mixed", "split"}
    for row in rows:
        assert row["goodput_per_gpu"] == pytest.approx(row["goodput"] / 2)
        assert row["low"] <= row["goodput"] <= row["bound"]
        assert row["probes"]


def test_a_trace_is_planned_for_as_well(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"{place * 0.1:.1f},500,4" for place in range(150)]
    trace.write_text("arrival_s,input_tokens,output_tokens\n" + "\n".join(rows))
    numbers = json.loads(run(*ASKED, "--trace", str(trace), "--json"))
    assert numbers["workload"] == "trace"
    assert numbers["best"] == "2m"
    trace.write_text("arrival_s,input_tokens,output_tokens\n" + "\n".join(rows[:50]))
    result = CliRunner().invoke(main, [*ASKED, "--trace", str(trace)])
    assert "needs 100 or more" in result.output


def test_requests_that_fit_no_context_are_left_out_of_a_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would be misses of every layout."""
    trace = tmp_path / "trace.csv"
    rows = [f"{place},{500 if place % 2 else 70_000},4" for place in range(300)]
    trace.write_text("arrival_s,input_tokens,output_tokens\n" + "\n".join(rows))
    kept = trace_of(trace, MINE.max_model_len)
    assert len(kept) == 150 and {one.num_prompt_tokens for one in kept} == {500}
    assert "note: 150 of 300 requests do not fit" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no request fits a context of 100"):
        trace_of(trace, 100)


@pytest.mark.slow
def test_distserves_algorithms() -> None:
    numbers = json.loads(run(*ASKED, "--algorithm", "low", "--json"))
    assert numbers["layout"] == "1p1d"
    said = run(*ASKED, "--algorithm", "high")
    assert "1p1d on 2 GPUs" in said
    assert "prefill" in said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--slo", "ttft=1ms,tpot=1ms"), "loosen the limits"),
        (("--gpus", "0"), "--gpus 0"),
        (("--goal", "1.5"), "--goal 1.5"),
        (("--rate", "3"), "--rate is for"),
        (("--ep", "0"), "--ep 0"),
        (("--profile", "nothing"), "no profile 'nothing'"),
        (("--workload", "nothing"), "no workload 'nothing'"),
        (("--figure", "plan.txt"), ".png or .svg"),
        (("--figure", "plan.svg", "--algorithm", "low"), "leave it out"),
        (("--startable", "--ep", "8"), "--startable leaves out"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said(more: tuple[str, str], words: str) -> None:
    assert words in CliRunner().invoke(main, [*ASKED, *more]).output


def test_degrees() -> None:
    assert eps_of("4,8,4") == (4, 8)
    with pytest.raises(ConfigError, match="--ep"):
        eps_of("a")


def test_nobody_profiles_without_workers() -> None:
    """It once took 0 for the default, and measured for minutes."""
    result = CliRunner().invoke(main, ["profile", "--workers", "0", "--device", "sim"])
    assert result.exit_code == 2 and "--workers" in result.output


# ---- start --layout auto


def asked(**changes: object) -> EngineConfig:
    plain = EngineConfig(
        layout="auto", slo="ttft=1s,tpot=1s", workload="synthetic(500,4)", profile="mine"
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


@pytest.mark.slow
def test_start_plans_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodeserve.plan.pool.os.sched_getaffinity", lambda _: {0})
    found = auto.planned(asked(device="sim", gpus="0,1"), Gpus())
    assert (found.layout, found.workload, found.profile) == ("2m", None, "mine")
    assert found.max_num_seqs == 64
    assert found.max_num_batched_tokens is not None
    said = capsys.readouterr().err
    assert "planning for synthetic(500,4) on 2 devices, profile mine" in said
    assert "layout 2m: do not disaggregate" in said
    real = auto.planned(asked(device="cpu", gpus="0,1", max_num_batched_tokens=512), Gpus())
    assert (real.layout, real.profile, real.max_num_batched_tokens) == ("2m", None, 512)


def test_a_workload_without_auto_is_refused() -> None:
    with pytest.raises(ConfigError, match="--layout auto plans for"):
        check_device(EngineConfig(layout="1p1d", workload="chat"), Gpus())


def test_auto_says_what_it_needs() -> None:
    with pytest.raises(ConfigError, match="give --slo"):
        auto.planned(asked(slo=None), Gpus())
    with pytest.raises(ConfigError, match="needs a --profile"):
        auto.planned(asked(device="sim", profile=None), Gpus())
    with pytest.raises(ConfigError, match="run `nodeserve profile`"):
        auto.planned(asked(device="cpu", profile=None), Gpus())
    with pytest.raises(ConfigError, match="is of several shapes"):
        auto.planned(asked(device="sim", profile="llama-3.1-8b-bf16-h100"), Gpus())
    with pytest.raises(ConfigError, match="no shape of one GPU"):
        auto.planned(asked(device="cpu", profile="opt-66b-a100", gpus="0,1"), Gpus())
    with pytest.raises(ConfigError, match="loosen the limits"):
        auto.planned(asked(device="sim", gpus="0", slo="ttft=1ms"), Gpus())
