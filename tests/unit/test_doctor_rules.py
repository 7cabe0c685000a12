"""Every rule of the doctor, from facts written down: no machine is looked at."""

from collections.abc import Callable
from typing import Any

import pytest

from nodeserve.cli.doctor.facts import Facts, SharedMemory
from nodeserve.cli.doctor.findings import OK, PROBLEM, WARNING, Finding, ranges, size
from nodeserve.cli.doctor.judge import judge, reason_and_advice, runs_on, what_runs, works
from nodeserve.nvml import GpuState, Survey
from tests.fakes.machines import changed, cpu_machine, gpu_machine
from tests.fakes.nvml import (
    GIB,
    FakeGpu,
    FakeNvml,
    bus_id,
    eight_h100,
    four_consumer,
    one_h200,
)

MIB = 1 << 20


def found(facts: Facts, check: str) -> list[Finding]:
    return [finding for finding in judge(facts) if finding.check == check]


def one(facts: Facts, check: str) -> Finding:
    (finding,) = found(facts, check)
    return finding


def marks(facts: Facts) -> dict[str, str]:
    """What is not well, by check."""
    return {finding.check: finding.mark for finding in judge(facts) if finding.mark != OK}


# ---- machines where all is well


def test_a_machine_without_a_gpu_is_well_and_says_what_runs() -> None:
    facts = cpu_machine()
    assert marks(facts) == {}
    assert what_runs(facts) == "CPU workers: native avx512_bf16 kernels, layout 1p1d"
    assert one(facts, "driver").text.endswith("CPU workers need none")
    assert one(facts, "extension").text.endswith("only CUDA workers need it")


@pytest.mark.parametrize("fake", [one_h200(), eight_h100()], ids=["one", "eight"])
def test_machines_with_gpus_are_well(monkeypatch: pytest.MonkeyPatch, fake: FakeNvml) -> None:
    facts = gpu_machine(monkeypatch, fake)
    assert marks(facts) == {}
    assert what_runs(facts).startswith("CUDA workers: layout ")


def test_gpus_that_are_alike_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = gpu_machine(monkeypatch, eight_h100())
    texts = [finding.text for finding in found(facts, "gpu")]
    assert [text[:9] for text in texts] == ["GPU 0-3: ", "GPU 4-7: "]
    assert "79.0 of 80.0 GiB free, compute capability 9.0, ECC on, 18 NVLinks" in texts[0]
    assert one(facts, "peer-access").text == "peer access: 28 pairs of GPUs, all over NVLink"


def test_one_gpu_has_no_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(gpu_machine(monkeypatch, one_h200()), "peer-access") == []


def test_roads_of_both_kinds_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    bridged = [FakeGpu(nvlinks=[bus_id(1)]), FakeGpu(nvlinks=[bus_id(0)]), FakeGpu()]
    facts = gpu_machine(monkeypatch, FakeNvml(bridged))
    assert one(facts, "peer-access").text.endswith("all over NVLink and PCIe")
    facts = gpu_machine(monkeypatch, FakeNvml([FakeGpu(), FakeGpu()]))
    assert one(facts, "peer-access").text == "peer access: 1 pair of GPUs, all over PCIe"


# ---- the driver and the GPUs


def test_consumer_cards_are_told_which_way_pages_go(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = gpu_machine(monkeypatch, four_consumer())
    assert marks(facts) == {"peer-access": WARNING}
    text = one(facts, "peer-access").text
    assert "missing for 6 of 6 pairs" in text and "pinned host memory" in text
    assert works(judge(facts))


def test_an_old_driver_is_a_problem_where_gpus_should_run(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml([FakeGpu()], driver="550.54", cuda=12040)
    facts = gpu_machine(monkeypatch, fake)
    assert marks(facts) == {"driver": PROBLEM, "torch": PROBLEM}  # torch's CUDA is 13
    assert "runs CUDA 12.4 and older: too old" in one(facts, "driver").text
    assert "driver 570" in one(facts, "driver").advice
    assert marks(gpu_machine(monkeypatch, fake, asked="cpu")) == {}


def test_no_driver_for_a_gpu_on_the_bus_is_a_warning() -> None:
    facts = changed(cpu_machine(), "machine", num_nvidia_devices=2)
    assert marks(facts) == {"driver": WARNING}
    assert "--gpus all" in one(facts, "driver").advice
    asked = changed(cpu_machine("cuda"), "machine", num_nvidia_devices=2)
    assert marks(asked)["driver"] == PROBLEM


def test_a_driver_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = changed(cpu_machine(), "outlook", gpu_obstacle="the NVIDIA driver sees no GPU")
    facts = changed(facts, "gpus", failure=None, driver="580.1", cuda=(13, 0))
    assert marks(facts) == {"driver": WARNING}
    assert "sees no GPU" in one(facts, "driver").text
    assert marks(changed(facts, "outlook", asked="cuda"))["driver"] == PROBLEM
    assert works(judge(facts))


def test_asking_for_cuda_without_a_gpu_is_a_problem() -> None:
    facts = changed(cpu_machine("cuda"), "outlook", refusal="--device cuda: no driver")
    assert marks(facts)["driver"] == PROBLEM
    assert marks(facts)["start"] == PROBLEM
    assert not works(judge(facts))


@pytest.mark.parametrize(
    ("gpu", "check", "mark", "words"),
    [
        (FakeGpu(compute_mode=2), "gpu-mode", PROBLEM, "forbids every CUDA process"),
        (FakeGpu(compute_mode=3), "gpu-mode", WARNING, "allows one process"),
        (FakeGpu(mig=True), "gpu-mig", WARNING, "MIG instances"),
        (FakeGpu(persistence=False), "gpu-persistence", WARNING, "persistence mode is off"),
        (FakeGpu(cpus=1 << 40), "gpu-cores", WARNING, "(0-7 may)"),
        (
            FakeGpu(free_bytes=2 * GIB, processes={71: 70 * GIB, 72: None}),
            *("gpu-memory", WARNING),
            "only 2.0 GiB free; processes: 71 (70.0 GiB), 72",
        ),
    ],
)
def test_states_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu, check: str, mark: str, words: str
) -> None:
    fake = FakeNvml([FakeGpu(), gpu])
    facts = gpu_machine(monkeypatch, fake)
    assert marks(facts) == {check: mark}
    finding = one(facts, check)
    assert finding.text.startswith("GPU 1: ") and words in finding.text and finding.advice
    assert marks(gpu_machine(monkeypatch, fake, asked="cpu")) == {}


def test_an_old_gpu_beside_a_new_one_is_to_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml([FakeGpu(), FakeGpu(capability=(7, 5))])
    assert marks(gpu_machine(monkeypatch, fake)) == {"gpu-capability": WARNING}


def test_where_all_gpus_are_old_cpu_workers_are_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = gpu_machine(monkeypatch, FakeNvml([FakeGpu(capability=(6, 1))], cuda=12020))
    facts = changed(facts, "outlook", device="cpu", gpu_obstacle="old")
    facts = changed(facts, "software", torch_cuda=None, extension_obstacle="not built: x")
    assert marks(facts) == {"gpu-capability": WARNING}


# ---- software

BROKEN: list[tuple[dict[str, Any], str, str]] = [
    ({"torch_cuda": None}, "torch", "a CPU build: CUDA workers cannot run"),
    ({"torch_cuda": "14.0"}, "torch", "the driver runs CUDA 13.0 and older"),
    ({"torch_devices": 0}, "torch", "it sees no GPU"),
    ({"torch": None, "failures": {"torch": "OSError: libcudart"}}, "torch", "OSError: libcudart"),
    ({"torch_archs": ("sm_100", "sm_120")}, "torch-kernels", "no kernels for GPU 0"),
    ({"triton": None}, "triton", "not installed"),
    ({"triton": None, "failures": {"triton": "ImportError: x"}}, "triton", "ImportError: x"),
    ({"extension_obstacle": "_cuda is not built: get nvcc"}, "extension", "_cuda is not built"),
    ({"failures": {"extension": "CudaError: old"}}, "extension", "CudaError: old"),
    ({"extension_devices": 0}, "extension", "sees 0 of 1 GPUs"),
    ({"failures": {"attention": "ConfigError: none"}}, "attention", "ConfigError: none"),
    ({"native": None, "failures": {"native": "ImportError: y"}}, "native", "ImportError: y"),
    ({"failures": {"probe": "took more than 120 s"}}, "probe", "took more than 120 s"),
]


@pytest.mark.parametrize(("values", "check", "words"), BROKEN)
def test_software_that_keeps_gpus_from_working(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], check: str, words: str
) -> None:
    facts = changed(gpu_machine(monkeypatch, one_h200()), "software", **values)
    assert marks(facts) == {check: PROBLEM}
    finding = one(facts, check)
    assert words in finding.text and finding.advice


@pytest.mark.parametrize(("values", "check", "words"), BROKEN)
def test_it_is_no_problem_where_cpus_work(values: dict[str, Any], check: str, words: str) -> None:
    """Unless CPU workers need it as well."""
    needed = "failures" in values and check not in ("triton", "extension", "attention")
    facts = changed(cpu_machine(), "software", **values)
    assert marks(facts) == ({check: PROBLEM} if needed else {})


def test_software_that_is_only_weaker(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = changed(gpu_machine(monkeypatch, eight_h100()), "software", extension_devices=4)
    assert marks(facts) == {"extension": WARNING}
    slow = changed(gpu_machine(monkeypatch, one_h200()), "software", attention="reference (x)")
    assert marks(slow) == {"attention": WARNING}
    assert marks(changed(cpu_machine(), "software", native="generic")) == {"native": WARNING}
    assert marks(changed(cpu_machine(), "software", native=None)) == {"native": WARNING}
    assert marks(changed(cpu_machine(), "software", torch=None)) == {"torch": WARNING}


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        (("sm_80",), (8, 6), True),
        (("sm_86",), (8, 0), False),
        (("sm_80",), (9, 0), False),
        (("sm_80", "compute_80"), (9, 0), True),
        (("compute_100",), (9, 0), False),
        (("sm_90a",), (9, 0), True),
        (("sm_90a", "sm_100a"), (10, 3), False),
        (("sm_100",), (10, 3), True),
        (("sm_120",), (12, 0), True),
        (("sm_80",), None, True),
    ],
)
def test_which_kernels_run_on_which_gpu(
    monkeypatch: pytest.MonkeyPatch,
    archs: tuple[str, ...],
    capability: tuple[int, int] | None,
    expected: bool,
) -> None:
    fake = FakeNvml([FakeGpu(capability=capability or (9, 0))])
    (gpu,) = gpu_machine(monkeypatch, fake).gpus.gpus
    told = GpuState(**{**{k: getattr(gpu, k) for k in gpu.__slots__}, "capability": capability})
    assert runs_on(archs, told) == expected


# ---- the machine and the start


def shm(free: int) -> dict[str, Any]:
    return {"shared_memory": SharedMemory(64 * MIB, free), "container": True}


@pytest.mark.parametrize(
    ("values", "check", "mark", "words"),
    [
        ({"shared_memory": None}, "shared-memory", PROBLEM, "is not there"),
        (shm(8 * MIB), "shared-memory", PROBLEM, "no room for rings"),
        (shm(64 * MIB), "shared-memory", WARNING, "64.0 MiB of 64.0 MiB free"),
        ({"open_files": 128}, "open-files", PROBLEM, "128"),
        ({"open_files": 512}, "open-files", WARNING, "512"),
    ],
)
def test_limits_of_the_machine(values: dict[str, Any], check: str, mark: str, words: str) -> None:
    facts = changed(cpu_machine(), "machine", **values)
    assert marks(facts) == {check: mark}
    assert words in one(facts, check).text and one(facts, check).advice


def test_a_container_is_told_dockers_option() -> None:
    small = changed(cpu_machine(), "machine", **shm(64 * MIB))
    assert "--shm-size" in one(small, "shared-memory").advice
    host = changed(small, "machine", container=False)
    assert "remount" in one(host, "shared-memory").advice


def test_no_limits_are_said_in_words() -> None:
    facts = changed(cpu_machine(), "machine", open_files=None, locked_bytes=None)
    assert marks(facts) == {}
    assert one(facts, "open-files").text.endswith("no limit")
    assert one(facts, "locked-memory").text.endswith("no limit")


@pytest.mark.parametrize(
    ("part", "values", "check", "mark", "words"),
    [
        ("socket", {"obstacle": "/x does not exist"}, "socket", PROBLEM, "/x does not exist"),
        ("outlook", {"refusal": "too little memory"}, "start", PROBLEM, "too little memory"),
        ("outlook", {"notes": ("3 workers share",)}, "note", WARNING, "3 workers share"),
        (
            "outlook",
            {"demo_model": None, "demo_model_obstacle": "the model is missing: get it"},
            *("demo-model", WARNING),
            "the model is missing",
        ),
    ],
)
def test_what_a_start_would_meet(
    part: str, values: dict[str, Any], check: str, mark: str, words: str
) -> None:
    facts = changed(cpu_machine(), part, **values)
    assert marks(facts) == {check: mark}
    assert words in one(facts, check).text


def test_a_running_server_is_named() -> None:
    facts = changed(cpu_machine(), "socket", listening_pid=4711)
    assert marks(facts) == {}
    assert "pid 4711" in one(facts, "socket").text


def test_every_finding_that_asks_for_something_says_what() -> None:
    broken = changed(cpu_machine("cuda"), "machine", shared_memory=None, open_files=1)
    broken = changed(broken, "software", failures={"native": "x", "torch": "y", "probe": "z"})
    broken = changed(broken, "socket", obstacle="w")
    wrong = [finding for finding in judge(broken) if finding.mark == PROBLEM]
    assert len(wrong) >= 7
    assert all(finding.advice for finding in wrong)


def test_the_attention_is_named_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = gpu_machine(monkeypatch, one_h200())
    assert one(facts, "attention").text == "attention: triton (flash-attn: not installed)"
    assert found(cpu_machine(), "attention") == []


# ---- words


@pytest.mark.parametrize(
    ("obstacle", "expected"),
    [
        ("x is not built: do y", ("x is not built", "do y")),
        (
            "not built: no nvcc was found; install it",
            ("not built: no nvcc was found", "install it"),
        ),
        ("it is so", ("it is so", "")),
    ],
)
def test_an_obstacle_has_two_halves(obstacle: str, expected: tuple[str, str]) -> None:
    assert reason_and_advice(obstacle) == expected


@pytest.mark.parametrize(
    ("function", "value", "expected"),
    [
        (size, 3 << 40, "3.0 TiB"),
        (size, 1536 << 20, "1.5 GiB"),
        (size, 64 << 20, "64.0 MiB"),
        (size, 100, "100 bytes"),
        (ranges, (0, 1, 2, 5, 7, 8), "0-2,5,7-8"),
        (ranges, (), ""),
    ],
)
def test_values_in_words(function: Callable[[Any], str], value: Any, expected: str) -> None:
    assert function(value) == expected


def test_no_driver_is_only_a_failure() -> None:
    assert cpu_machine().gpus == Survey(failure=cpu_machine().gpus.failure)
