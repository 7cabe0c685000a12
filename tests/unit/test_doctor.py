"""The doctor's eyes, its two voices and its exit code; the rules have a file of their own."""

import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nodeserve.cli import main
from nodeserve.cli.doctor import collect, command
from nodeserve.cli.doctor.facts import Facts, Software
from nodeserve.cli.doctor.findings import OK, PROBLEM
from nodeserve.cli.doctor.judge import judge
from nodeserve.cli.doctor.judge_selftest import judge_selftest
from nodeserve.cli.doctor.selftest import TINY_MODEL, Outcome, Run, write_tiny_model
from nodeserve.cli.doctor.show import as_json, make_console, show
from nodeserve.worker import probe
from tests.fakes.machines import changed, cpu_machine, gpu_machine
from tests.fakes.nvml import eight_h100, four_consumer, no_driver

PAGE = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()


def run(monkeypatch: pytest.MonkeyPatch, facts: Facts, *arguments: str) -> Result:
    monkeypatch.setattr(command, "collect", lambda device: facts)
    return CliRunner().invoke(main, ["doctor", *arguments])


# ---- what people read


def test_a_healthy_machine_in_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, cpu_machine())
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert [line for line in lines if not line.startswith(" ")] == [
        *("GPUs", "software", "machine", "start"),
        "all is well",
    ]
    what = "`nodeserve start` runs CPU workers: native avx512_bf16 kernels, layout 1p1d"
    assert f"  ok       {what}" in lines
    assert "  ok       torch 2.11.0+cpu, a CPU build" in lines


def test_problems_come_with_advice_and_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = gpu_machine(monkeypatch, four_consumer())
    facts = changed(facts, "software", torch_cuda=None, torch="2.11.0+cpu")
    result = run(monkeypatch, facts)
    lines = result.stdout.splitlines()
    assert result.exit_code == 1
    at = lines.index("  problem  torch 2.11.0+cpu, a CPU build: CUDA workers cannot run")
    assert lines[at + 1] == "           -> install a torch built for the driver's CUDA"
    assert lines[-1] == "1 problem, 1 warning"


def test_warnings_alone_are_code_0(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, gpu_machine(monkeypatch, four_consumer()))
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "1 warning")


@pytest.mark.parametrize("width", [80, 200])
def test_the_roads_between_gpus_fit_a_small_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    facts = gpu_machine(monkeypatch, eight_h100())
    console = make_console()
    console.width = width
    show(facts, judge(facts), console)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= width for line in lines)
    rows = [line.split() for line in lines if line.split()[1:2] in (["-"], ["NV18"])]
    assert [row[0] for row in rows] == list("01234567")
    assert rows[1] == ["1", "NV18", "-", *["NV18"] * 6, "0-3", "0"]
    assert any("28 pairs of GPUs, all over NVLink" in line for line in lines)


def test_missing_peer_access_is_marked_in_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = gpu_machine(monkeypatch, four_consumer())
    show(facts, judge(facts), make_console())
    assert ["0", "-", "PHB!", "PHB!", "PHB!", "0-3", "0"] in [
        line.split() for line in capsys.readouterr().out.splitlines()
    ]


# ---- what machines read


def documented(title: str) -> set[str]:
    """The keys in the table below a heading of docs/doctor.md."""
    section = re.split(r"\n#+ ", PAGE.split(f"# {title}\n")[1])[0]
    return set(re.findall(r"^\| `(\w+)` ", section, re.MULTILINE))


OUTCOME = Outcome("cpu", None, "Tiny", False, (Run("1m"), Run("1p1d")))


def test_the_page_lists_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = gpu_machine(monkeypatch, eight_h100())
    told = json.loads(json.dumps(as_json(facts, judge(facts), OUTCOME)))
    assert documented("The object") == set(told)
    assert documented("A finding") == set(told["findings"][0])
    assert documented("machine") == set(told["machine"])
    assert documented("gpus") == set(told["gpus"])
    assert documented("A GPU") == set(told["gpus"]["gpus"][0])
    assert documented("A link") == set(told["gpus"]["links"][0])
    assert documented("software") == set(told["software"])
    assert documented("socket") == set(told["socket"])
    assert documented("outlook") == set(told["outlook"])
    assert documented("selftest") == set(told["selftest"])
    assert documented("A run") == set(told["selftest"]["runs"][0])


def test_json_says_the_same_as_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    good = run(monkeypatch, cpu_machine(), "--json")
    told = json.loads(good.stdout)
    assert (good.exit_code, told["ok"], told["version"]) == (0, True, 1)
    assert told["runs"] == "CPU workers: native avx512_bf16 kernels, layout 1p1d"
    refused = changed(cpu_machine(), "outlook", refusal="no room")
    bad = run(monkeypatch, refused, "--json")
    told = json.loads(bad.stdout)
    assert (bad.exit_code, told["ok"], told["runs"]) == (1, False, None)


def test_an_unknown_device_is_wrong_usage() -> None:
    assert CliRunner().invoke(main, ["doctor", "--device", "tpu"]).exit_code == 2


# ---- the self-test's worth

GOOD = Outcome(
    *("cpu", None, "SmolLM2", True),
    (
        Run("1m", None, 2.0, 1.0, "native", "", 0, 0, [[1, 2], [3, 4]], [" Paris", "x"]),
        Run("1p1d", None, 2.0, 1.0, "native", "shm", 2, 4096, [[1, 2], [3, 4]], [" Paris", "x"]),
    ),
)


def with_second(**values: Any) -> Outcome:
    return replace(GOOD, runs=(GOOD.runs[0], replace(GOOD.runs[1], **values)))


def test_a_good_selftest_says_what_was_compared() -> None:
    found = judge_selftest(GOOD)
    assert {finding.mark for finding in found} == {OK}
    texts = [finding.text for finding in found]
    assert "the 4 tokens of 1p1d are those of 1m" in texts
    assert any("2 handoffs, 4096 bytes, shm" in text for text in texts)
    assert any('"The capital of France is" goes on with "Paris..."' in text for text in texts)


@pytest.mark.parametrize(
    ("outcome", "check", "words"),
    [
        (with_second(error="it broke"), "selftest-run", "1p1d: it broke"),
        (with_second(num_handoffs=1), "selftest-run", "fewer handoffs than prompts"),
        (with_second(handoff_bytes=0), "selftest-run", "fewer handoffs than prompts"),
        (with_second(left_behind=["socket x"]), "selftest-clean", "left behind: socket x"),
        (
            with_second(tokens=[[1, 2], [3, 5]]),
            *("selftest-tokens", "prompt 2, token 2: 4 from 1m, 5 from 1p1d"),
        ),
        (
            with_second(tokens=[[1, 2], [3]]),
            *("selftest-tokens", "prompt 2: 2 tokens from 1m, 1 from 1p1d"),
        ),
        (
            replace(GOOD, runs=tuple(replace(each, texts=[" Rome"]) for each in GOOD.runs)),
            *("selftest-words", "Rome"),
        ),
        (
            replace(GOOD, runs=tuple(replace(each, tokens=[[], []]) for each in GOOD.runs)),
            *("selftest-tokens", "no token came"),
        ),
    ],
)
def test_what_a_selftest_finds(outcome: Outcome, check: str, words: str) -> None:
    wrong = [finding for finding in judge_selftest(outcome) if finding.mark == PROBLEM]
    assert [finding.check for finding in wrong] == [check]
    assert words in wrong[0].text and wrong[0].advice


def test_a_selftest_that_fails_is_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def fake(*arguments: Any) -> Outcome:
        asked.append(arguments[:3])
        return with_second(error="it broke")

    monkeypatch.setattr(command, "selftest", fake)
    result = run(monkeypatch, cpu_machine(), "--selftest", "--json")
    told = json.loads(result.stdout)
    assert asked == [("cpu", [], "SmolLM2-135M-Instruct")]
    assert (result.exit_code, told["ok"]) == (1, False)
    assert told["selftest"]["runs"][1]["error"] == "it broke"
    facts = gpu_machine(monkeypatch, eight_h100())
    lines = run(monkeypatch, facts, "--selftest").stdout.splitlines()
    assert asked[1][:2] == ("cuda", list(range(8)))
    assert "  problem  1p1d: it broke" in lines


def test_the_tiny_model_is_one_that_can_be_served(tmp_path: Path) -> None:
    from nodeserve.config_readers import folder_config

    config = folder_config(write_tiny_model(tmp_path / "tiny"))
    assert (config.architecture, config.vocab_size) == ("llama", TINY_MODEL["vocab_size"])


# ---- the eyes


def python(script: str) -> tuple[str, ...]:
    return (sys.executable, "-c", script)


def test_a_probe_that_answers() -> None:
    lines = [{"part": "native", "value": {"isa": "avx2"}}, {"part": "torch", "error": "OSError: x"}]
    script = "print('hello')\n" + "".join(f"print({json.dumps(json.dumps(x))})\n" for x in lines)
    software = collect.software(python(script), timeout_s=60)
    assert (software.native, software.torch) == ("avx2", None)
    assert software.failures == {"torch": "OSError: x"}


def test_a_probe_that_dies_names_the_part() -> None:
    script = (
        "import os, signal, sys\n"
        """print('{"part": "native", "value": {"isa": "avx2"}}')\n"""
        """print('{"part": "torch"}', flush=True)\n"""
        "print('illegal', file=sys.stderr, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    software = collect.software(python(script), timeout_s=60)
    assert software.native == "avx2"
    assert software.failures == {"torch": "died of signal 9: illegal"}


def test_a_probe_that_hangs_is_ended() -> None:
    script = """print('{"part": "torch"}', flush=True)\nimport signal\nsignal.pause()"""
    software = collect.software(python(script), timeout_s=4.0)  # it must have begun by then
    assert software.failures == {"torch": "took more than 4 s"}


def test_a_probe_that_cannot_start_is_told_as_itself() -> None:
    software = collect.software(python("import no_such_module"), timeout_s=60)
    (words,) = software.failures.values()
    assert list(software.failures) == ["probe"]
    assert words.startswith("ended with exit code 1: ModuleNotFoundError")


def test_the_probe_goes_on_after_a_part_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("no")

    assert probe.main({"a": broken, "b": lambda: {"x": 1}}) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        {"part": "a"},
        {"part": "a", "error": "RuntimeError: no"},
        {"part": "b"},
        {"part": "b", "value": {"x": 1}},
    ]


def test_every_probed_part_is_read() -> None:
    known = {field.name for field in fields(Software)}
    assert {"extension_devices" if part == "extension" else part for part in probe.PARTS} <= known


def test_nvidia_devices_on_the_bus(tmp_path: Path) -> None:
    for name, vendor, kind in (
        ("0000:01:00.0", "0x10de", "0x030200"),
        ("0000:02:00.0", "0x10de", "0x030000"),
        ("0000:02:00.1", "0x10de", "0x040300"),  # its sound
        ("0000:03:00.0", "0x8086", "0x030000"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    (tmp_path / "broken").mkdir()
    assert collect.num_nvidia_devices(tmp_path) == 2
    assert collect.num_nvidia_devices(tmp_path / "none") == 0


def test_meminfo() -> None:
    text = "MemTotal:       100 kB\nMemAvailable:   60 kB\nHugePages_Total:  0\n"
    assert collect.meminfo(text) == {"MemTotal": 102400, "MemAvailable": 61440}


def test_where_the_socket_would_be(tmp_path: Path) -> None:
    missing = tmp_path / "none" / "x.sock"
    told = collect.sockets({"NODESERVE_SOCKET": str(missing)})
    assert told.obstacle == f"the folder {missing.parent} does not exist"
    assert collect.sockets({"XDG_RUNTIME_DIR": str(tmp_path)}).obstacle is None
    on_demand = collect.sockets({"TMPDIR": str(tmp_path)})
    assert (on_demand.obstacle, on_demand.listening_pid) == (None, None)
    assert "at most" in str(collect.sockets({"NODESERVE_SOCKET": "/" + "x" * 200}).obstacle)


def test_no_shared_memory(tmp_path: Path) -> None:
    assert collect.shared_memory(tmp_path / "none") is None
    assert collect.shared_memory(tmp_path) is not None


def test_what_start_would_do_is_asked_of_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    no_driver().install(monkeypatch)
    asked = collect.outlook("cuda")
    assert asked.refusal is not None and "--device cuda: no NVIDIA driver answers" in asked.refusal
    default = collect.outlook("auto")
    assert (default.device, default.refusal) == ("cpu", None)
    assert default.layout in ("1p1d", "1m")


def test_the_machine_is_looked_at_without_our_extension() -> None:
    """A broken build is what the doctor is asked about."""
    script = (
        "import sys\nfrom nodeserve.cli.doctor import collect, command, judge\n"
        "collect.outlook('auto'), collect.machine(), collect.sockets({})\n"
        "assert not {'nodeserve._host', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run(python(script), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_the_demo_model_the_layout_is_still_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodeserve.checkpoint.EMBEDDED_PACKAGE", "no_such_package")
    no_driver().install(monkeypatch)
    told = collect.outlook("auto")
    assert told.demo_model is None and "not installed" in str(told.demo_model_obstacle)
    assert told.layout in ("1p1d", "1m")
    assert collect.outlook("cuda").refusal is not None
