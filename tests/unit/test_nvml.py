"""What is made of the driver's answers, and of answers that it does not give."""

import pynvml
import pytest

from nodeserve.gpus import find_gpus
from nodeserve.nvml import GpuLink, GpuProcess, NvmlFailed, Survey, opened, survey
from tests.fakes.nvml import (
    GIB,
    FakeGpu,
    FakeNvml,
    bus_id,
    eight_h100,
    four_consumer,
    no_driver,
    one_h200,
)


def test_without_a_driver_only_the_reason_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    no_driver().install(monkeypatch)
    found = survey()
    assert found == Survey(failure=found.failure)
    assert "no NVIDIA driver answers" in str(found.failure)


def test_a_driver_that_cannot_list_is_named_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml(list_error=pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    fake.install(monkeypatch)
    assert "cannot list its GPUs" in str(survey().failure)
    assert fake.open_sessions == 0


def test_one_gpu_tells_all(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = one_h200()
    fake.gpus[0].processes = {71: 3 * GIB, 72: None}
    fake.install(monkeypatch)
    found = survey()
    assert (found.driver, found.cuda, found.links) == ("580.65.06", (13, 0), ())
    (gpu,) = found.gpus
    assert (gpu.name, gpu.capability, gpu.bus_id) == ("NVIDIA H200", (9, 0), bus_id(0))
    assert (gpu.total_bytes, gpu.free_bytes) == (141 * GIB, 140 * GIB)
    assert (gpu.ecc, gpu.persistence, gpu.mig, gpu.compute_mode) == (True, True, False, "default")
    assert (gpu.num_nvlinks, gpu.numa_node, gpu.cpus) == (18, 0, (0, 1, 2, 3))
    assert gpu.processes == (GpuProcess(71, 3 * GIB), GpuProcess(72, None))
    assert fake.open_sessions == 0


def test_links_through_a_switch_lead_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    eight_h100().install(monkeypatch)
    found = survey()
    assert len(found.links) == 28
    assert {(x.num_nvlinks, x.road, x.peer_obstacle) for x in found.links} == {
        (18, "between CPU sockets", None)
    }
    assert [gpu.numa_node for gpu in found.gpus] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert found.gpus[7].cpus == (4, 5, 6, 7)


def test_direct_links_lead_to_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    first = FakeGpu(nvlinks=[bus_id(1)] * 4 + [bus_id(2)] * 2)
    second = FakeGpu(nvlinks=[bus_id(0)] * 4)
    third = FakeGpu(nvlinks=[bus_id(0)] * 2)
    FakeNvml([first, second, third]).install(monkeypatch)
    counts = {(x.first, x.second): x.num_nvlinks for x in survey().links}
    assert (counts[0, 1], counts[0, 2]) == (4, 2)


def test_cards_without_links_or_peer_access(monkeypatch: pytest.MonkeyPatch) -> None:
    four_consumer().install(monkeypatch)
    found = survey()
    assert found.links[0] == GpuLink(0, 1, 0, "PCIe host bridge", "not supported")
    assert (found.gpus[0].ecc, found.gpus[0].mig) == (None, None)


def test_peer_access_must_be_there_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml([FakeGpu(), FakeGpu()], peer=lambda first, second: 4 * (first > second))
    fake.install(monkeypatch)
    assert survey().links[0].peer_obstacle == "it is disabled in the driver's settings"


def test_a_call_that_fails_inside_closes_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = one_h200()
    fake.install(monkeypatch)
    with pytest.raises(NvmlFailed), opened() as nvml:
        raise nvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
    assert fake.open_sessions == 0


# ---- what keeps `nodeserve start` from using them


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        (FakeNvml(), "sees no GPU"),
        (FakeNvml([FakeGpu()], cuda=12040), "runs CUDA 12.4 at most: install one for CUDA 12.8"),
        (FakeNvml([FakeGpu("GTX", capability=(6, 1))]), "GPU 0 (GTX) has compute capability 6.1"),
    ],
)
def test_what_is_too_old_is_an_obstacle(
    monkeypatch: pytest.MonkeyPatch, fake: FakeNvml, words: str
) -> None:
    fake.install(monkeypatch)
    assert words in str(find_gpus().obstacle)


@pytest.mark.parametrize(
    "fake",
    [
        FakeNvml([FakeGpu()], cuda=12080),
        FakeNvml([FakeGpu()], cuda=None),
        FakeNvml([FakeGpu(capability=(6, 1)), FakeGpu(capability=(8, 0))]),
    ],
)
def test_what_is_new_enough_or_unknown_is_none(
    monkeypatch: pytest.MonkeyPatch, fake: FakeNvml
) -> None:
    fake.install(monkeypatch)
    obstacle = find_gpus().obstacle
    assert obstacle is None or "torch" in obstacle or "_cuda" in obstacle
