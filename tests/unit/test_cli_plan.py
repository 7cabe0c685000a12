"""`nodeserve plan`, and the plan that `start --layout auto` makes, on a cost model of a file."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from nodeserve import profile_store
from nodeserve.cli import auto, main
from nodeserve.cli.plan import check_requests, eps_of, readable_config, within
from nodeserve.config import EngineConfig
from nodeserve.coordinator.placement import check_device
from nodeserve.errors import ConfigError
from nodeserve.gpus import Gpu, Gpus
from nodeserve.layout import Shape
from nodeserve.plan.candidates import all_candidates, variations
from nodeserve.plan.efforts import EFFORTS, Effort
from nodeserve.plan.estimates import Estimator
from nodeserve.plan.evaluate import Question
from nodeserve.plan.goodput import Slo
from nodeserve.plan.requests import Source
from nodeserve.policy.cost import StepCost
from nodeserve.policy.profiles import PROFILES
from nodeserve.policy.sizes import Anatomy

NO_GPUS = Gpus(obstacle="none here")
TINY = Effort(30, 60, 120, 1, 0.2, 0)
MINE = replace(
    PROFILES["llama-3.1-8b-h100"],
    name="mine",
    cost=StepCost(0.010, 0.010, 1e-4, 0.0, 1e-5, 0.0),
    noise=0.0,
    max_num_batched_tokens=1024,
    max_num_seqs=64,
    anatomy=None,
)
OF_ANY = (
    *("plan", "some/model", "--profile", "mine", "--gpus", "2", "--slo", "ttft=1s,tpot=1s"),
    *("--effort", "quick", "--processes", "1"),
)
ASKED = (*OF_ANY, "--workload", "synthetic(500,4)")


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODESERVE_PROFILES", str(tmp_path))
    monkeypatch.setitem(EFFORTS, "quick", TINY)
    monkeypatch.setattr(auto, "EFFORT", TINY)
    profile_store.write(MINE, {"threads": 1})


def run(*words: str) -> str:
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_it_draws_the_finalists(tmp_path: Path) -> None:
    run(*ASKED, "--figure", str(tmp_path / "plan.svg"))
    drawn = (tmp_path / "plan.svg").read_text()
    assert "<!-- 2m, chunk 1024 -->" in drawn and "<!-- 1p1d, chunk 1024 -->" in drawn
    assert "goodput, requests a second and GPU, 95% range" in drawn and "in time, %" in drawn


def test_it_prints_a_ranking_the_reason_and_the_command() -> None:
    said = run(*ASKED)
    assert "mine on 2 GPUs, synthetic(500,4); 90% of the requests" in said
    assert "do not disaggregate: 2m serves" in said
    assert (
        "nodeserve start some/model --layout 2m --max-num-seqs 64 --max-num-batched-tokens" in said
    )
    assert "--slo ttft=1000ms,tpot=1000ms" in said


def test_shapes_that_nobody_measured_are_named() -> None:
    """With prompts as long as the limit on one worker, and half as long on two."""
    shaped = replace(MINE, name="shaped", anatomy=PROFILES["llama-3.1-8b-h100"].anatomy)
    profile_store.write(shaped, {})
    asked = (
        *("plan", "--profile", "shaped", "--gpus", "2", "--slo", "ttft=80ms"),
        *("--effort", "quick", "--processes", "1", "--workload", "synthetic(800,2)"),
    )
    said = run(*asked)
    assert "by formula from one worker's passes, not measured (docs/plan.md): tp2" in said
    assert "nodeserve start --layout 1m:tp2" in said
    assert json.loads(run(*asked, "--json"))["by_formula"] == ["tp2"]
    assert "no layout of 2 GPUs" in run(*asked, "--measured")


def folder_of(path: Path, context: int) -> Path:
    """A model that lies here and takes so many tokens."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = {name: 64 for name in (*sizes, "num_key_value_heads", "vocab_size")}
    path.mkdir()
    words = {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": context}
    (path / "config.json").write_text(json.dumps({**config, **words, "head_dim": 2}))
    return path


def test_the_command_asks_for_no_longer_context_than_was_planned_for(tmp_path: Path) -> None:
    """The model's own would take more memory than was planned with."""
    said = run("plan", str(folder_of(tmp_path / "model", 131_072)), *ASKED[2:])
    (command,) = [line for line in said.splitlines() if line.startswith("nodeserve start")]
    assert f"--max-model-len {MINE.max_model_len}" in command


def test_a_context_is_known_if_the_model_lies_here(tmp_path: Path) -> None:
    model = folder_of(tmp_path / "model", 400)
    found = readable_config(str(model))
    assert found is not None and found.max_position == 400
    assert readable_config("some/model") is None, "nothing is fetched for a plan"
    default = readable_config(None)
    assert default is not None and default.max_position == 8192
    (model / "config.json").write_text("{}")
    assert readable_config(str(model)) is None


def test_a_plan_is_for_requests_that_the_model_takes(tmp_path: Path) -> None:
    whole = Question(MINE, Source("chat"), Slo(1.0, 1.0), 2)
    assert within(whole, 400).context == 400
    assert within(whole, 131_072) == within(whole, None) == whole
    shorter = replace(whole, max_model_len=300)
    assert within(shorter, 400) == shorter
    asked = ("plan", str(folder_of(tmp_path / "model", 400)), *ASKED[2:])
    assert "no request fits a context of 400" in CliRunner().invoke(main, asked).output
    told = CliRunner().invoke(main, [*asked, "--max-model-len", "600"]).output
    assert "--max-model-len 600: use 2 to 400" in told


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
    numbers = json.loads(run(*OF_ANY, "--trace", str(trace), "--json"))
    assert numbers["workload"] == "trace"
    assert numbers["best"] == "2m"
    short = tmp_path / "short.csv"
    short.write_text("arrival_s,input_tokens,output_tokens\n" + "\n".join(rows[:50]))
    result = CliRunner().invoke(main, [*OF_ANY, "--trace", str(short)])
    assert "needs 100 or more" in result.output


def test_requests_that_fit_no_context_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would be misses of every layout; `nodeserve bench` does not send them either."""
    trace = tmp_path / "trace.csv"
    rows = [f"{place},{500 if place % 2 else 70_000},4" for place in range(300)]
    trace.write_text("arrival_s,input_tokens,output_tokens\n" + "\n".join(rows))
    question = Question(MINE, Source(trace=trace), Slo(1.0, 1.0), 2)
    check_requests(question)
    assert {one.num_prompt_tokens for one in question.requests(1.0, 1000)} == {500}
    assert "50.0% of the requests do not fit" in capsys.readouterr().err
    long_chats = replace(question, traffic=Source("chat"), max_model_len=300)
    check_requests(long_chats)
    assert "of the requests do not fit" in capsys.readouterr().err
    lengths = long_chats.lengths()
    assert len(lengths) == 1000 and all(sum(pair) <= 300 for pair in lengths)
    assert max(map(sum, lengths)) > 250  # left out, not cut
    with pytest.raises(ConfigError, match="no request fits a context of 100"):
        check_requests(replace(question, max_model_len=100))


def test_it_plans_for_the_requests_that_bench_sends() -> None:
    scaled = ("--workload", "synthetic(4000,32)", "--scale-lengths", "8", "--seed", "5")
    numbers = json.loads(run(*ASKED, *scaled, "--json"))
    assert numbers["requests"]["prompt_tokens"] == 500
    assert numbers["requests"]["output_tokens"] == 4
    assert (numbers["requests"]["divisor"], numbers["requests"]["seed"]) == (8.0, 5)


@pytest.mark.parametrize("algorithm", ["high", "low"])
def test_a_rate_for_a_data_centre_is_refused_at_once(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Estimator, "estimate", None)  # nothing is simulated
    words = [*ASKED, "--algorithm", algorithm, "--rate", "50000"]
    said = CliRunner().invoke(main, words).output
    found = re.search(r"--rate 50000 needs (\d+) GPUs or more", said)
    # A GPU takes at most 1024 tokens in 112 ms, prompts have 500, and some GPUs decode.
    assert found is not None and 2000 < int(found[1]) < 5000, said


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
        (("--figure", "/dev/null/x.svg"), "cannot write /dev/null"),
        (("--figure", "plan.svg", "--algorithm", "low"), "leave it out"),
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
    assert found.max_model_len is None
    real = auto.planned(asked(device="cpu", gpus="0,1", max_num_batched_tokens=512), Gpus())
    assert (real.layout, real.profile, real.max_num_batched_tokens) == ("2m", None, 512)
    assert real.max_model_len is None  # the default model's is shorter than the profile's
    profile_store.write(replace(MINE, max_model_len=2000), {"threads": 1})
    shorter = auto.planned(asked(device="cpu", gpus="0,1"), Gpus())
    assert shorter.max_model_len == 2000


def question_for(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch, gpus: Gpus = NO_GPUS
) -> Question:
    """What is planned for these settings."""
    asked_for: list[Question] = []

    def look(question: Question, *_: object) -> None:
        asked_for.append(question)
        raise ConfigError("seen")

    monkeypatch.setattr(auto, "plan", look)
    with pytest.raises(ConfigError, match="seen"):
        auto.planned(config, gpus)
    return asked_for[0]


def test_start_plans_with_shapes_that_it_can_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the default model, which has 9 heads and 30 layers."""
    unknown = replace(MINE, name="shaped", anatomy=Anatomy(30, 3, 2304, 270e6, fixed_pool=True))
    profile_store.write(unknown, {"threads": 1})
    config = asked(device="cpu", profile="shaped", gpus="0-3")
    assert question_for(config, monkeypatch).shapes == (Shape(),)
    assert "not planned with tp2, pp2, tp4, tp2.pp2, pp4: the profile does not say" in (
        capsys.readouterr().err
    )
    assert unknown.anatomy is not None
    known = replace(unknown, anatomy=replace(unknown.anatomy, sum_bytes_per_s=1e9))
    profile_store.write(known, {"threads": 1})
    shapes = question_for(config, monkeypatch).shapes
    assert shapes is not None and "not planned" not in capsys.readouterr().err
    assert {str(shape) for shape in shapes} == {"", "tp2", "pp2", "tp4", "tp2.pp2", "pp4"}
    family = question_for(asked(device="sim", profile="opt-66b-a100", gpus="0-3"), monkeypatch)
    assert family.shapes is not None and Shape(tp=2, pp=2) in family.shapes


def test_gpus_that_do_not_hold_the_model_are_planned_in_teams(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default model's weights take 270 MB, the keys and values of its context 190 MB."""
    shaped = replace(MINE, name="shaped", anatomy=Anatomy(30, 3, 1152, 270e6))
    profile_store.write(shaped, {})
    gpus = Gpus(tuple(Gpu(index, "small", 400_000_000, 400_000_000) for index in range(2)))
    question = question_for(asked(profile="shaped"), monkeypatch, gpus)
    assert (question.num_gpus, question.shapes) == (2, (Shape(tp=2), Shape(pp=2)))
    assert "not planned with one worker: weights and one sequence" in capsys.readouterr().err
    auto.tell_unknown(question, "1m:tp2", on_gpus=True)
    said = capsys.readouterr().err
    assert "not measured (docs/plan.md): passes of tp2" in said and "not run on real ones" in said


def test_pages_have_the_size_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    config = asked(device="sim", gpus="0,1", kv_memory=10_000 * MINE.kv_bytes_per_token)
    question = question_for(replace(config, max_model_len=600), monkeypatch)
    profile = question.model.of(Shape())
    assert (profile.num_kv_tokens, profile.max_model_len) == (10_000, 600)


def test_a_start_gets_as_many_gpus_as_the_layout_takes() -> None:
    assert auto.gpus_for("1m:tp2", "3,0-2") == "3,0"
    assert auto.gpus_for("1m:tp2", None) is None


def test_start_plans_with_what_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not with other values, which it then would not start."""
    told = asked(
        device="sim",
        gpus="0,1",
        max_num_seqs=32,
        max_num_batched_tokens=256,
        max_model_len=600,
        window="20",
        window_k=2.0,
        admission="pull",
        decode_allocation="iqr",
    )
    question = question_for(told, monkeypatch)
    assert question.context == 600
    candidates = all_candidates(
        Estimator(question, TINY).kinds, 2, 32, question.max_num_batched_tokens, 0.02
    )
    assert {one.max_num_batched_tokens for one in candidates} == {256}
    scenario = question.scenario(candidates[0])
    assert scenario.decode_allocation == "iqr"
    dispatch = scenario.dispatch
    assert (dispatch.admission, dispatch.window_s, dispatch.window_k) == ("pull", 0.02, 2.0)
    assert (dispatch.budget, dispatch.max_num_seqs) == (256, 32)
    kept = variations(candidates[0], 32, keep_chunk=True)
    assert kept == []  # another chunk, or no window, is not what was asked for


def test_a_chunk_below_the_batch_is_refused_before_planning() -> None:
    with pytest.raises(ConfigError, match="is below --max-num-seqs"):
        auto.planned(asked(device="sim", gpus="0,1", max_num_batched_tokens=32), Gpus())


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
    with pytest.raises(ConfigError, match="loosen the limits"):
        auto.planned(asked(device="sim", gpus="0", slo="ttft=1ms"), Gpus())
